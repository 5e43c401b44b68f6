"""DoRA, `lora_bias` and `bias` to and from real `peft`: every layer it supports, merged, and with dropout.

A dropped magnitude or bias must fail: it is what a loader that does not know the key computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file, save_file  # noqa: E402

import lora_jax as lj  # noqa: E402
from lora_jax.sites import LORA_BIAS, MAGNITUDE  # noqa: E402
from lora_torch import config_for, load_peft, plan_peft, save_peft, to_torch_state_dict  # noqa: E402
from tests.interop import peft_models  # noqa: E402
from tests.interop.layout_toys import TOYS, conv, experts_stacked, numbers, outputs, scanned, torch_base  # noqa: E402
from tests.interop.peft_models import agree, random_adapter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of its own deprecations

# The setting, its leaf, and what a loader that lost it would compute with.
DORA, ON_B = ("use_dora", MAGNITUDE, 1.0), ("lora_bias", LORA_BIAS, 0.0)
LAYERS = ["scanned layers", "fused, indexed", "fused, one product", "heads", "conv 2d", "experts, modules"]
CASES = [(name, variant) for variant in (DORA, ON_B) for name in LAYERS] + [("conv 1d", DORA), ("embedding", DORA)]
TENSORS = "adapter_model.safetensors"


def without(adapter: lj.Adapter, leaf: str, value: float) -> lj.Adapter:
    """The same adapter as a loader has it who lost these leaves."""
    leaves = {p: adapter.leaf(p) for s in adapter.sites for p in s.leaves}
    return lj.Adapter.from_leaves(
        {p: jnp.full_like(x, value) if leaf in p else x for p, x in leaves.items()}, adapter.sites
    )


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_both_ways(name: str, variant: tuple[str, str, float], tmp_path: Path) -> None:
    setting, leaf, lost = variant
    toy = TOYS[name]()
    params, x = numbers(toy.shapes), jnp.asarray(toy.x)
    plan = lj.plan(toy.fn, params, x, config=lj.LoRAConfig(**toy.config, **{setting: True}))
    apply = jax.jit(lj.apply(toy.fn, plan))
    adapter = random_adapter(plan)
    want, base = np.asarray(apply(params, adapter, x)), np.asarray(toy.fn(params, x))
    directory = save_peft(adapter, tmp_path / "ours", plan, names=toy.naming)
    theirs = peft.PeftModel.from_pretrained(torch_base(toy, params), directory)
    assert agree(outputs(toy, theirs), want)
    if setting == "use_dora":  # these layers have no bias of their own to merge one into
        assert agree(outputs(toy, theirs.merge_and_unload()), np.asarray(toy.fn(lj.merge(params, adapter), x)))
    assert not agree(base, want) and not agree(np.asarray(apply(params, without(adapter, leaf, lost), x)), want)
    back = load_peft(directory, plan, names=toy.naming)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(back), strict=True))
    assert load_peft(directory, plan.sites, names=toy.naming).sites == plan.sites

    torch.manual_seed(2)
    config = peft.LoraConfig(**toy.peft, **{setting: True}, init_lora_weights=False)
    theirs = peft.get_peft_model(torch_base(toy, params), config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if MAGNITUDE in key:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    want = outputs(toy, theirs)
    plan = plan_peft(tmp_path / "theirs", toy.fn, params, x, names=toy.naming)
    adapter = load_peft(tmp_path / "theirs", plan, names=toy.naming)
    assert all(site.vectors == (leaf,) for site in plan.sites)
    apply = jax.jit(lj.apply(toy.fn, plan))
    assert agree(np.asarray(apply(params, adapter, x)), want)
    assert not agree(np.asarray(apply(params, without(adapter, leaf, lost), x)), want)


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
    assert not agree(model.ours(plan, without(adapter, MAGNITUDE, 1.0)), want)


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


class Torch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(6, 6)}) for _ in range(2))
        self.norm, self.head = torch.nn.LayerNorm(6), torch.nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + torch.tanh(layer["up"](x))
        return self.head(self.norm(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x + jnp.tanh(nn.Dense(6, name="up")(x)), None


class Flax(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(4, name="head")(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


BIASES = {
    "lora_only": (dict(target_modules=["up"]), {"layers.0.up", "layers.1.up"}),
    "all": (dict(target_modules=["up"]), {"layers.0.up", "layers.1.up", "norm", "head"}),
    "lora_only with a bias on B": (dict(target_modules=["up", "head"], lora_bias=True), {"layers.0.up", "head"}),
    "all with a copied head": (dict(target_modules=["up"], modules_to_save=["head"]), {"layers.0.up", "norm"}),
}


@pytest.mark.parametrize("case", BIASES)
def test_biases(case: str, tmp_path: Path) -> None:
    """Stored at `base_layer.bias` for adapted modules and by their own names for others; merged into the base."""
    settings, named = BIASES[case]
    settings = {**settings, "bias": case.split(" ")[0]}
    x = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    net = Flax()
    like = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    params = numbers(jax.tree.map(lambda leaf: leaf.shape, like))
    state = to_torch_state_dict(params, preset="linen", stacks=("layers",), kind="torch")

    def make() -> Any:
        model = Torch()
        model.load_state_dict({k: v.clone() for k, v in state.items()})
        return model.eval()

    def run(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(torch.tensor(x)).numpy()

    def fn(p: Any, x: Any) -> Any:
        return net.apply({"params": p}, x)

    plan = lj.plan(fn, params, x, config=lj.LoRAConfig(rank=2, alpha=3, **settings))
    adapter = random_adapter(plan)
    want, base = np.asarray(lj.apply(fn, plan)(params, adapter, x)), np.asarray(fn(params, x))
    assert agree(run(make()), base) and agree(np.asarray(fn(lj.merge(params, adapter), x)), want)
    directory = save_peft(adapter, tmp_path / "ours", plan)
    assert json.loads((directory / "adapter_config.json").read_text())["bias"] == settings["bias"]
    keys = load_file(directory / TENSORS)
    for module in named:
        inner = "" if module in ("norm", "head") and "head" not in settings["target_modules"] else ".base_layer"
        assert f"base_model.model.{module}{inner}.bias" in keys
    theirs = peft.PeftModel.from_pretrained(make(), directory)
    assert agree(run(theirs), want) and not agree(base, want)
    assert agree(run(theirs.merge_and_unload()), want)
    lost = jax.tree_util.tree_map_with_path(lambda p, v: v if p[-1].key != "bias" else 0 * v, adapter)
    assert not agree(np.asarray(lj.apply(fn, plan)(params, lost, x)), want)
    back = load_peft(directory, plan)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(back), strict=True))

    torch.manual_seed(2)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, **settings, init_lora_weights=False))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    want = run(theirs)
    plan = plan_peft(tmp_path / "theirs", fn, params, x)
    adapter = load_peft(tmp_path / "theirs", plan)
    assert agree(np.asarray(lj.apply(fn, plan)(params, adapter, x)), want)
    assert not agree(np.asarray(fn(params, x)), want)
    again = lj.plan(fn, params, x, config=config_for(tmp_path / "theirs"))
    assert {s.name for s in again.sites} == {s.name for s in plan.sites}
    with pytest.raises(ValueError, match="vLLM"):
        save_peft(adapter, tmp_path / "vllm", plan, target="vllm")


TOKENS = [4, 49, 0]


@pytest.mark.parametrize(("name", "table"), [("llama", "embed_tokens"), ("gpt2", "wte")])
def test_token_rows(name: str, table: str, tmp_path: Path) -> None:
    """Rows of the embedding; GPT-2's head is tied to it, and changes with it in PEFT as here."""
    if not hasattr(pytest.importorskip("transformers"), "FlaxPreTrainedModel"):
        pytest.skip("transformers 5 has no Flax models")
    model = getattr(peft_models, name)()
    target = {"llama": "q_proj", "gpt2": "c_attn"}[name]
    settings = dict(target_modules=[target], trainable_token_indices={table: TOKENS})
    plan = model.plan(lj.LoRAConfig(rank=2, **settings))
    adapter = random_adapter(plan)
    want = model.ours(plan, adapter)
    site = next(site for site in plan.sites if site.tokens)
    assert site.tied == (name == "gpt2")
    assert agree(model.plain(lj.merge(model.params, adapter)), want)
    directory = save_peft(adapter, tmp_path / "ours", plan, names="hf-flax")
    assert agree(peft_models.peft_logits(model, directory), want)
    for lost in range(len(TOKENS)):
        leaves = {p: adapter.leaf(p) for s in plan.sites for p in s.leaves}
        rows = leaves[(path := next(iter(site.leaves)))]
        other = lj.Adapter.from_leaves({**leaves, path: rows.at[lost].set(0)}, plan.sites)
        if TOKENS[lost] in peft_models.IDS or site.tied:
            assert not agree(model.ours(plan, other), want)
    back = load_peft(directory, plan, names="hf-flax")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(back), strict=True))
    with pytest.raises(ValueError, match="vLLM takes no modules trained in full"):
        save_peft(adapter, tmp_path / "vllm", plan, names="hf-flax", target="vllm")

    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=[target], trainable_token_indices=TOKENS, init_lora_weights=False)
    theirs = peft.get_peft_model(model.make(), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    want = peft_models.logits(theirs)
    plan = plan_peft(tmp_path / "theirs", model.fn, model.params, jnp.asarray(peft_models.IDS), names="hf-flax")
    adapter = load_peft(tmp_path / "theirs", plan, names="hf-flax")
    assert agree(model.ours(plan, adapter), want) and not agree(model.base, want)
    other = {
        **json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()),
        "trainable_token_indices": [1, 2, 3],
    }
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(
        ValueError, match=r"the file trains rows \[1, 2, 3\] and has \(3, 32\), the plan trains \[4, 49, 0\]"
    ):
        load_peft(tmp_path / "theirs", plan, names="hf-flax")


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


def test_replicated_layers(tmp_path: Path) -> None:
    """PEFT repeats the layers of its own two-layer model; ours has four, with shared weights."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxPreTrainedModel"):
        pytest.skip("transformers 5 has no Flax models")
    model = peft_models.llama()
    ranges, ids = [[0, 2], [1, 2], [0, 1]], jnp.asarray(peft_models.IDS)
    config = transformers.LlamaConfig(
        **{**peft_models.TEXT, "num_hidden_layers": 4}, num_key_value_heads=2, tie_word_embeddings=False
    )
    module = transformers.FlaxLlamaForCausalLM(config, _do_init=False).module
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)

    def fn(p: Any, ids: Any) -> Any:
        return module.apply({"params": p}, ids, jnp.ones_like(ids), position_ids=places).logits

    params = lj.replicate_layers(model.params, "model.layers", ranges)
    settings = dict(target_modules=["q_proj", "down_proj"], layer_replication=ranges)
    plan = lj.plan(fn, params, ids, config=lj.LoRAConfig(rank=2, **settings))
    adapter = random_adapter(plan)
    want = np.asarray(jax.jit(lj.apply(fn, plan))(params, adapter, ids))
    directory = save_peft(adapter, tmp_path / "ours", plan, names="hf-flax")
    assert agree(peft_models.peft_logits(model, directory), want)
    assert not agree(np.asarray(fn(params, ids)), want) and not agree(model.base, want)
    with pytest.raises(ValueError, match="`layer_replication`: vLLM repeats no layers"):
        save_peft(adapter, tmp_path / "vllm", plan, names="hf-flax", target="vllm")

    torch.manual_seed(2)
    theirs = peft.get_peft_model(model.make(), peft.LoraConfig(r=2, **settings, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    plan = plan_peft(tmp_path / "theirs", fn, params, ids, names="hf-flax")
    adapter = load_peft(tmp_path / "theirs", plan, names="hf-flax")
    assert plan.config.layer_replication == tuple(map(tuple, ranges))
    assert agree(np.asarray(jax.jit(lj.apply(fn, plan))(params, adapter, ids)), peft_models.logits(theirs))
    with pytest.raises(ValueError, match="layers.2.* is not in the plan"):
        plan_peft(tmp_path / "theirs", model.fn, model.params, ids, names="hf-flax")
