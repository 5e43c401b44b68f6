"""Every shape of site against what real `peft` computes with the exported factors on a small torch model.

Compared are the weights themselves, W + s·A·B: ours merged and converted, theirs from the layers' own forward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file, save_file  # noqa: E402

import lora_jax as lj  # noqa: E402
from lora_torch import load_peft, plan_peft, save_peft  # noqa: E402
from tests.interop.layout_toys import TOYS, conv, numbers, outputs, scanned, torch_base  # noqa: E402
from tests.interop.peft_models import agree, random_adapter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of its own deprecations and of grouped convolutions


@pytest.mark.parametrize("name", TOYS)
def test_ours_in_peft(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]()
    params = numbers(toy.shapes)
    plan = lj.plan(toy.fn, params, jnp.asarray(toy.x), config=lj.LoRAConfig(**toy.config))
    adapter = random_adapter(plan)
    directory = save_peft(adapter, tmp_path / "adapter", plan, names=toy.naming)
    want = np.asarray(lj.apply(toy.fn, plan)(params, adapter, jnp.asarray(toy.x)))
    base = outputs(toy, torch_base(toy, params))
    assert agree(base, np.asarray(toy.fn(params, jnp.asarray(toy.x))))
    assert agree(outputs(toy, peft.PeftModel.from_pretrained(torch_base(toy, params), directory)), want)
    assert not agree(base, want)
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    save_peft(doubled, directory, plan, names=toy.naming, overwrite=True)
    assert not agree(outputs(toy, peft.PeftModel.from_pretrained(torch_base(toy, params), directory)), want)

    save_peft(adapter, directory, plan, names=toy.naming, overwrite=True)
    back = load_peft(directory, plan, names=toy.naming)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(back), strict=True))
    assert load_peft(directory, plan.sites, names=toy.naming).sites == plan.sites


@pytest.mark.parametrize("name", [n for n in TOYS if "groups" not in n and "depthwise" not in n])
def test_peft_in_ours(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]()
    params = numbers(toy.shapes)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(torch_base(toy, params), peft.LoraConfig(**toy.peft, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    want = outputs(toy, theirs)
    plan = plan_peft(tmp_path, toy.fn, params, jnp.asarray(toy.x), names=toy.naming)
    adapter = load_peft(tmp_path, plan, names=toy.naming)
    apply = lj.apply(toy.fn, plan)
    assert agree(np.asarray(apply(params, adapter, jnp.asarray(toy.x))), want)
    assert not agree(np.asarray(toy.fn(params, jnp.asarray(toy.x))), want)
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    assert not agree(np.asarray(apply(params, doubled, jnp.asarray(toy.x))), want)


def test_a_grouped_adapter_of_pefts_own_is_refused(tmp_path: Path) -> None:
    toy = conv(2, groups=2)
    params = numbers(toy.shapes)
    config = peft.LoraConfig(r=4, target_modules=["conv"], init_lora_weights=False)
    peft.get_peft_model(torch_base(toy, params), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="conv: PEFT's lora_A of a convolution with 2 groups reads channels of every"):
        plan_peft(tmp_path, toy.fn, params, jnp.asarray(toy.x), names=toy.naming)


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=["layers.1.up", "head"]),
        dict(target_modules=["up"], exclude_modules=["layers.0.up"], rank_pattern={"layers.1.up": 3}),
        dict(target_modules=["up"], layers_to_transform=[2], layers_pattern=["layers"], alpha_pattern={"up": 3}),
    ],
)
def test_layers_of_a_stack_that_peft_left_out_are_zeros(settings: dict[str, Any], tmp_path: Path) -> None:
    toy = scanned()
    params = numbers(toy.shapes)
    theirs = peft.get_peft_model(torch_base(toy, params), peft.LoraConfig(r=2, **settings, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    want = outputs(toy, theirs)
    plan = plan_peft(tmp_path, toy.fn, params, jnp.asarray(toy.x))
    adapter = load_peft(tmp_path, plan)
    apply = lj.apply(toy.fn, plan)
    assert agree(np.asarray(apply(params, adapter, jnp.asarray(toy.x))), want)
    assert not agree(np.asarray(toy.fn(params, jnp.asarray(toy.x))), want)
    # What is zero in both factors gets no gradient, so these layers stay the base's in training.
    grads = jax.grad(lambda a: (apply(params, a, jnp.asarray(toy.x)) ** 2).sum())(adapter)
    for factor, grad in zip(adapter.factors(plan.sites[-1]), grads.factors(plan.sites[-1]), strict=True):
        assert not np.any(np.asarray(grad)[~np.any(np.asarray(factor), axis=(1, 2))]) and np.any(np.asarray(grad))


def test_unequal_scales_of_a_bfloat16_file_are_folded_in_float32(tmp_path: Path) -> None:
    toy = scanned()
    params = numbers(toy.shapes)
    config = peft.LoraConfig(r=2, target_modules=["up"], alpha_pattern={"layers.2.up": 5}, init_lora_weights=False)
    peft.get_peft_model(torch_base(toy, params), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    narrow = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(file).items()}
    save_file(narrow, file)
    plan = plan_peft(tmp_path, toy.fn, params, jnp.asarray(toy.x))
    _, b = load_peft(tmp_path, plan).factors(plan.sites[0])
    want = narrow["base_model.model.layers.2.up.lora_B.weight"].astype(np.float32).T * np.float32(5 / 8)
    assert np.array_equal(np.asarray(b)[2], want)
    assert not np.array_equal(want.astype(ml_dtypes.bfloat16).astype(np.float32), want)
