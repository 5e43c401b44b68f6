"""DoRA to and from real `peft`: every layer it supports, both spellings of the magnitude, merged and with dropout.

A dropped magnitude must fail: it is what a loader that does not know the key computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file, save_file  # noqa: E402

import lora_jax as lj  # noqa: E402
from lora_jax.sites import MAGNITUDE  # noqa: E402
from lora_torch import load_peft, plan_peft, save_peft  # noqa: E402
from tests.interop import peft_models  # noqa: E402
from tests.interop.peft_models import agree, random_adapter  # noqa: E402
from tests.interop.test_peft_layouts import TOYS, conv, experts_stacked, numbers, outputs, scanned, torch_base  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of its own deprecations

CASES = [
    "scanned layers",
    "fused, indexed",
    "fused, one product",
    "heads",
    "conv 1d",
    "conv 2d",
    "embedding",
    "experts, modules",
]
TENSORS = "adapter_model.safetensors"


def of_ones(adapter: lj.Adapter) -> lj.Adapter:
    """The same adapter with magnitudes that a loader would have who lost them."""
    leaves = {p: adapter.leaf(p) for s in adapter.sites for p in s.leaves}
    for site in adapter.sites:
        path = site.leaf_path(MAGNITUDE)
        leaves[path] = jnp.ones_like(leaves[path])
    return lj.Adapter.from_leaves(leaves, adapter.sites)


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]()
    params, x = numbers(toy.shapes), jnp.asarray(toy.x)
    plan = lj.plan(toy.fn, params, x, config=lj.LoRAConfig(**toy.config, use_dora=True))
    apply = jax.jit(lj.apply(toy.fn, plan))
    adapter = random_adapter(plan)
    want, base = np.asarray(apply(params, adapter, x)), np.asarray(toy.fn(params, x))
    directory = save_peft(adapter, tmp_path / "ours", plan, names=toy.naming)
    theirs = peft.PeftModel.from_pretrained(torch_base(toy, params), directory)
    assert agree(outputs(toy, theirs), want)
    assert agree(outputs(toy, theirs.merge_and_unload()), np.asarray(toy.fn(lj.merge(params, adapter), x)))
    assert not agree(base, want) and not agree(np.asarray(apply(params, of_ones(adapter), x)), want)
    back = load_peft(directory, plan, names=toy.naming)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(back), strict=True))
    assert load_peft(directory, plan.sites, names=toy.naming).sites == plan.sites

    torch.manual_seed(2)
    config = peft.LoraConfig(**toy.peft, use_dora=True, init_lora_weights=False)
    theirs = peft.get_peft_model(torch_base(toy, params), config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if MAGNITUDE in key:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    want = outputs(toy, theirs)
    plan = plan_peft(tmp_path / "theirs", toy.fn, params, x, names=toy.naming)
    adapter = load_peft(tmp_path / "theirs", plan, names=toy.naming)
    assert all(site.dora for site in plan.sites)
    apply = jax.jit(lj.apply(toy.fn, plan))
    assert agree(np.asarray(apply(params, adapter, x)), want)
    assert not agree(np.asarray(apply(params, of_ones(adapter), x)), want)


def test_transformers_reads_the_magnitude(tmp_path: Path) -> None:
    """The file has both spellings: transformers 5 drops the bare one, and peft takes either."""
    if not hasattr(pytest.importorskip("transformers"), "FlaxPreTrainedModel"):
        pytest.skip("transformers 5 has no Flax models")
    model = peft_models.llama()
    plan = model.plan(lj.LoRAConfig(rank=4, alpha=6, target_modules=["q_proj", "down_proj"], use_dora=True))
    adapter = random_adapter(plan)
    want = model.ours(plan, adapter)
    directory = save_peft(adapter, tmp_path / "a", plan, names="hf-flax")
    assert agree(peft_models.transformers_logits(model, directory), want)
    tensors = load_file(directory / TENSORS)
    for spelling in (f"{MAGNITUDE}.weight", MAGNITUDE):
        save_file({k: v for k, v in tensors.items() if MAGNITUDE not in k or k.endswith(spelling)}, directory / TENSORS)
        assert agree(peft_models.peft_logits(model, directory), want), spelling
        assert agree(model.ours(plan, load_peft(directory, plan, names="hf-flax")), want), spelling
    assert not agree(model.ours(plan, of_ones(adapter)), want)


def test_with_dropout(tmp_path: Path) -> None:
    """In training, with the mask that ours draws put into torch: the base's own product is of the whole input."""
    from lora_jax.interpret import site_key
    from lora_jax.ops.dropout import dropout

    toy = TOYS["heads"]()
    params, x = numbers(toy.shapes), jnp.asarray(toy.x)
    settings: dict[str, Any] = {**toy.config, "target_modules": ["q"], "use_dora": True, "dropout": 0.4}
    plan = lj.plan(toy.fn, params, x, config=lj.LoRAConfig(**settings))
    adapter, key = random_adapter(plan), jax.random.key(3)
    want = np.asarray(lj.apply(toy.fn, plan)(params, adapter, x, key=key))
    theirs = peft.PeftModel.from_pretrained(
        torch_base(toy, params), save_peft(adapter, tmp_path / "a", plan, names=toy.naming)
    )
    dropped = torch.tensor(np.asarray(dropout(x, jax.random.fold_in(site_key(key, plan.sites[0]), 0), 0.4)))

    class Mask(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return dropped

    theirs.base_model.model.q.lora_dropout["default"] = Mask()
    with torch.no_grad():
        got = toy.from_torch(theirs.train()(toy.to_torch(toy.x)))
    assert agree(got, want)
    assert not agree(outputs(toy, theirs), want) and not agree(
        np.asarray(lj.apply(toy.fn, plan)(params, adapter, x)), want
    )


def refused(toy: Any, message: str, tmp_path: Path, **options: Any) -> None:
    params, x = numbers(toy.shapes), jnp.asarray(toy.x)
    plan = lj.plan(toy.fn, params, x, config=lj.LoRAConfig(**toy.config, use_dora=True))
    with pytest.raises(ValueError, match=message):
        save_peft(random_adapter(plan), tmp_path / "a", plan, names=toy.naming, **options)
    assert not (tmp_path / "a").exists()


def test_what_has_no_form_in_peft_is_refused(tmp_path: Path) -> None:
    refused(experts_stacked(False), "PEFT has no DoRA for raw parameters; name per-expert modules", tmp_path)
    refused(conv(2, groups=2), "conv: PEFT's DoRA knows no convolution in 2 groups", tmp_path)
    refused(scanned(), "vLLM does not read DoRA", tmp_path, target="vllm")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    toy = scanned()
    params, x = numbers(toy.shapes), jnp.asarray(toy.x)
    config = peft.LoraConfig(r=2, target_modules=["layers.1.up", "head"], use_dora=True, init_lora_weights=False)
    peft.get_peft_model(torch_base(toy, params), config).save_pretrained(tmp_path / "some")
    with pytest.raises(ValueError, match="stacks layers.0.up, which is not adapted, with layers that are: with DoRA"):
        plan_peft(tmp_path / "some", toy.fn, params, x)

    plan = lj.plan(toy.fn, params, x, config=lj.LoRAConfig(**toy.config, use_dora=True))
    directory = save_peft(random_adapter(plan), tmp_path / "a", plan, names=toy.naming)
    plain = lj.plan(toy.fn, params, x, config=lj.LoRAConfig(**toy.config))
    with pytest.raises(ValueError, match="the file has rank 2, alpha 3 with DoRA, the plan rank 2, alpha 3"):
        load_peft(directory, plain, names=toy.naming)
    tensors = load_file(directory / TENSORS)
    key = f"base_model.model.head.{MAGNITUDE}"
    save_file({**tensors, key: tensors[key] + 1}, directory / TENSORS)
    with pytest.raises(ValueError, match=f"head.{MAGNITUDE}.* is not the same"):
        load_peft(directory, plan, names=toy.naming)
    save_file({**tensors, key: tensors[key][1:], f"{key}.weight": tensors[key][1:]}, directory / TENSORS)
    with pytest.raises(ValueError, match=rf"head: {MAGNITUDE} is \(3,\), but lora_B \(4, 2\)"):
        load_peft(directory, plan, names=toy.naming)
