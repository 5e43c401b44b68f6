"""From Flax parameters to PyTorch modules: what the roles decide, and every case that must be said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_torch import Naming, Rule, config_for, load_peft, plan_peft, save_peft, target_names
from tests.interop.peft_models import random_adapter

X = jnp.ones((3, 4))
CHANNELS_LAST = ("NHC", "HIO", "NHC")


def plan_of(fn: Callable[..., Any], params: Any, *args: Any, **settings: Any) -> lj.Plan:
    return lj.plan(fn, params, *(args or (X,)), config=lj.LoRAConfig(**{"rank": 2, **settings}))


def product(params: Any, x: Any) -> Any:
    """Contracts every kernel's axis 0 with `x`."""
    return [jnp.tensordot(x, w, 1) for w in jax.tree.leaves(params)]


def test_general_names() -> None:
    params = {
        "layers_0": {"q": {"kernel": jnp.ones((4, 3))}},
        "encoder": {"layers": {"11": {"k": {"kernel": jnp.ones((4, 2, 3))}}}},
        "params_": {"conv_1": {"kernel": jnp.ones((4, 3))}},
    }
    plan = plan_of(product, params)
    assert target_names(plan) == {
        "layers_0.q.kernel": ("layers.0.q",),
        "encoder.layers.11.k.kernel": ("encoder.layers.11.k",),
        "params_.conv_1.kernel": ("params_.conv.1",),
    }
    assert target_names(plan, "nnx")["params_.conv_1.kernel"] == ("params_.conv_1",)
    renamed = target_names(plan, {"layers_*.q.kernel": "model.h.*.query.weight"})
    assert renamed["layers_0.q.kernel"] == ("model.h.0.query",)


def test_the_collection_of_a_variables_dict_is_no_module(tmp_path: Path) -> None:
    params = {"params": {"q": {"kernel": jnp.ones((4, 3))}}}
    plan = plan_of(product, params)
    adapter = random_adapter(plan)
    directory = save_peft(adapter, tmp_path / "a", plan)
    assert "base_model.model.q.lora_A.weight" in load_file(directory / "adapter_model.safetensors")
    again = load_peft(directory, plan_peft(directory, product, params, X))
    assert again.sites == adapter.sites


def test_stacks_are_numbered_where_layers_are_listed() -> None:
    def deep(p: Any, x: Any) -> Any:
        def step(x: Any, layer: Any) -> Any:
            return jnp.tanh(x @ layer["q"]["kernel"]), None

        for stack in ("layers", "tower"):
            if stack in p:
                x, _ = jax.lax.scan(step, x, p[stack])
        return x

    stacked = {"layers": {"q": {"kernel": jnp.ones((2, 4, 4))}}}
    assert target_names(plan_of(deep, stacked)) == {"layers.q.kernel": ("layers.0.q", "layers.1.q")}
    tower = {"tower": {"q": {"kernel": jnp.ones((2, 4, 4))}}}
    with pytest.raises(ValueError, match=r"axis 0 of length 2: say .*`Naming\(stacks=\('tower',\)\)`"):
        target_names(plan_of(deep, tower))
    names = Naming(preset="linen", stacks=("tower",))
    assert target_names(plan_of(deep, tower), names) == {"tower.q.kernel": ("tower.0.q", "tower.1.q")}


class Nested(nn.Module):
    """A scan in a scan, with a mixture of experts as raw parameters."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                w = self.param("experts_up", nn.initializers.ones, (2, 4, 4))
                return jnp.einsum("bd,edf->ebf", x, w).sum(0), None

        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                scan = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
                return scan(name="layers")(x, None)[0], None

        scan = nn.scan(Outer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(name="stages")(x, None)[0]


def test_stacks_of_stacks_of_experts(tmp_path: Path) -> None:
    params = jax.eval_shape(Nested().init, jax.random.key(0), X)["params"]
    plan = plan_of(lambda p, x: Nested().apply({"params": p}, x), params, target_modules=["experts_up"])
    naming = Naming(
        stacks=("stages", "stages.layers"),
        rules=[
            Rule(
                "stages.*.layers.*.experts_up",
                to="stages.*.layers.*.experts.{e}.up.weight",
                layout="e d f -> f d",
            )
        ],
    )
    names = target_names(plan, naming)["stages.layers.experts_up"]
    assert names[0] == "stages.0.layers.0.experts.0.up" and names[-1] == "stages.1.layers.2.experts.1.up"
    assert len(set(names)) == 12
    adapter = random_adapter(plan)
    directory = save_peft(adapter, tmp_path / "a", plan, names=naming)
    a, b = (np.asarray(x) for x in adapter.factors(plan.sites[0]))
    tensors = load_file(directory / "adapter_model.safetensors")
    for i, j, e in np.ndindex(2, 3, 2):
        key = f"base_model.model.stages.{i}.layers.{j}.experts.{e}.up.lora_"
        # The roles of the expert axis (kept or stacked) decide which factors it indexes; the product never changes.
        got = tensors[key + "B.weight"] @ tensors[key + "A.weight"]
        left = a[i, j] if a.ndim == 4 else a[i, j, e]
        right = b[i, j][:, e] if a.ndim == 4 else b[i, j, e]
        assert np.allclose(got, (left @ right).T, atol=1e-6) and np.abs(got).max() > 0.01
    back = load_peft(directory, plan, names=naming)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(adapter), strict=True))


def test_nnx_models(tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    plan = plan_of(lambda s, x: nnx.merge(graph, s)(x), nnx.to_pure_dict(state))
    assert set(target_names(plan, "nnx").values()) == {("layers.0",), ("layers.1",)}
    directory = save_peft(random_adapter(plan), tmp_path / "a", plan, names="nnx")
    assert config_for(directory).target_modules == ("layers.0", "layers.1")


REFUSED: dict[str, tuple[Any, Callable[..., Any], Naming, str]] = {
    "a part of a tensor": (
        {"q": {"kernel": jnp.ones((4, 4))}},
        product,
        Naming(rules=[Rule("q.kernel", to="in_proj_weight", layout="linear", part=0)]),
        "`q.kernel` is only a part of `in_proj_weight`",
    ),
    "a layout that mixes sides": (
        {"q": {"kernel": jnp.ones((4, 2, 3))}},
        product,
        Naming(layouts={"q.kernel": "n h d -> d (n h)"}),
        "roles ioo, which fits none of the layouts",
    ),
    "a rule for nothing": (
        {"q": {"kernel": jnp.ones((4, 3))}},
        product,
        Naming(names={"k.kernel": "k.weight"}),
        "rule 'k.kernel' matches no parameter",
    ),
    "one name for two": (
        {"q": {"kernel": jnp.ones((4, 3))}, "k": {"kernel": jnp.ones((4, 3))}},
        product,
        Naming(names={"q.kernel": "p.weight", "k.kernel": "p.weight"}),
        "both become `p`",
    ),
    "a transposed convolution": (
        {"up": {"kernel": jnp.ones((3, 4, 2))}},
        lambda p, x: jax.lax.conv_transpose(
            x[None], p["up"]["kernel"], (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        Naming(layouts={"up.kernel": "conv_transpose"}),
        "is a transposed convolution, which PEFT cannot adapt",
    ),
    "a transposed convolution whose name does not say so": (
        {"up": {"kernel": jnp.ones((3, 4, 4))}},
        lambda p, x: jax.lax.conv_transpose(
            x[None], p["up"]["kernel"], (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        Naming(preset="linen"),
        "is a transposed convolution, which PEFT cannot adapt",
    ),
    "a raw table": (
        {"table": jnp.ones((9, 3))},
        lambda p, x: p["table"][x[:, 0].astype(int)],
        Naming(),
        r"would be the raw parameter `table`; name its module, `names=\{'table': '….weight'\}`",
    ),
    "a weight used from both sides": (
        {"w": {"kernel": jnp.ones((4, 3))}},
        lambda p, x: x @ p["w"]["kernel"] @ p["w"]["kernel"].T,
        Naming(preset="linen"),
        "is used from both sides",
    ),
    "parameters whose order is not known": (
        {"experts": {"a": jnp.ones((2, 4, 4)), "b": jnp.ones((2, 4, 4))}},
        lambda p, x: [jnp.einsum("ebd,edf->ebf", jnp.ones((2, 3, 4)), w) for w in p["experts"].values()],
        Naming(),
        "has several adapted parameters, a, b, which PEFT nests",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_in_peft(case: str, tmp_path: Path) -> None:
    params, fn, naming, message = REFUSED[case]
    plan = plan_of(fn, params, target_modules=".*")
    with pytest.raises(ValueError, match=message):
        save_peft(random_adapter(plan), tmp_path / "a", plan, names=naming)
    assert not (tmp_path / "a").exists()


def test_a_model_without_the_modules_of_the_file(tmp_path: Path) -> None:
    params = {"q": {"kernel": jnp.ones((4, 3))}}
    plan = plan_of(product, params)
    directory = save_peft(random_adapter(plan), tmp_path / "a", plan)
    other = {"query": {"kernel": jnp.ones((4, 3))}}
    with pytest.raises(ValueError, match="none of the modules is in the model, whose own are called query"):
        plan_peft(directory, product, other, X)
    two = {**params, **other}
    assert [s.name for s in plan_peft(directory, product, two, X).sites] == ["q.kernel"]
    assert [s.name for s in plan_peft(directory, product, other, X, names={"query.kernel": "q.weight"}).sites] == [
        "query.kernel"
    ]


def test_an_adapter_of_torchs_attention_is_refused(tmp_path: Path) -> None:
    """PEFT gives query, key and value of `MultiheadAttention` one A; Flax has three kernels and no such module."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch_model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2, batch_first=True)})
    peft.get_peft_model(torch_model, peft.LoraConfig(r=2, target_modules=["attn"])).save_pretrained(tmp_path)
    model, x = nn.MultiHeadDotProductAttention(2), jnp.ones((1, 3, 8))
    params = {"attn": model.init(jax.random.key(0), x)["params"]}
    with pytest.raises(ValueError, match=r"none of the modules is in the model, whose own are called attn\.key, attn"):
        plan_peft(tmp_path, lambda p, x: model.apply({"params": p["attn"]}, x), params, x, names="linen")


def test_routers_are_planned_where_the_file_has_them(tmp_path: Path) -> None:
    params = {"mlp": {"gate": {"kernel": jnp.ones((4, 3))}, "up": {"kernel": jnp.ones((4, 3))}}}
    plan = plan_of(product, params, target_modules=["gate", "up"])
    directory = save_peft(random_adapter(plan), tmp_path / "a", plan)
    assert plan_peft(directory, product, params, X).sites == plan.sites


def test_the_base_weight_beside_an_embedding_must_be_the_bases(tmp_path: Path) -> None:
    params = {"embed": {"embedding": jnp.arange(12.0).reshape(4, 3)}}

    def lookup(p: Any, x: Any) -> Any:
        return p["embed"]["embedding"][x[:, 0].astype(int)]

    plan = plan_of(lookup, params, target_modules=["embed"])
    directory = save_peft(random_adapter(plan), tmp_path / "a", plan)
    path = directory / "adapter_model.safetensors"
    key = "base_model.model.embed.base_layer.weight"
    table = np.asarray(params["embed"]["embedding"])
    save_file({**load_file(path), key: table}, path)
    with pytest.raises(ValueError, match="embed.base_layer.weight is the base's weight, .* pass `params=`"):
        load_peft(directory, plan)
    assert load_peft(directory, plan, params=params).sites == plan.sites
    assert plan_peft(directory, lookup, params, X).sites == plan.sites
    other = {"embed": {"embedding": params["embed"]["embedding"] + 1}}
    with pytest.raises(ValueError, match="is not the base's weight"):
        load_peft(directory, plan, params=other)
    save_file({**load_file(path), key: np.vstack([table, table[:1]])}, path)
    with pytest.raises(ValueError, match=r"base_layer.weight \(5, 3\) is not the base's weight \(4, 3\)"):
        load_peft(directory, plan, params=params)


def test_the_base_weight_of_a_tied_head_is_the_table(tmp_path: Path) -> None:
    params = {"embed": {"embedding": jnp.arange(12.0).reshape(4, 3)}}
    tied = {"head.weight": "embed.weight"}

    def model(p: Any, x: Any) -> Any:
        return p["embed"]["embedding"][x[:, 0].astype(int)] @ p["embed"]["embedding"].T

    plan = plan_of(model, params, target_modules=["embed"])
    directory = save_peft(random_adapter(plan), tmp_path / "a", plan, tied=tied)
    path, table = directory / "adapter_model.safetensors", np.asarray(params["embed"]["embedding"])
    bases = {f"base_model.model.{name}.base_layer.weight": table for name in ("embed", "head")}
    save_file({**load_file(path), **bases}, path)
    assert load_peft(directory, plan, params=params, tied=tied).sites == plan.sites
    save_file({**load_file(path), "base_model.model.head.base_layer.weight": table + 1}, path)
    with pytest.raises(ValueError, match="head.base_layer.weight .4, 3. is not the base's weight"):
        load_peft(directory, plan, params=params, tied=tied)


def test_a_grouped_convolution_with_an_a_of_its_own_per_group(tmp_path: Path) -> None:
    """Not what we write, but expressible: the ranks add up and B is zero across groups."""

    def conv(p: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, p["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2
        )

    params = {"conv": {"kernel": jnp.ones((3, 2, 6))}}
    x = jnp.ones((1, 5, 4))
    plan = plan_of(conv, params, x, target_modules=["conv"], alpha=3)
    directory = save_peft(random_adapter(plan), tmp_path / "a", plan)
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    a, b = (tensors[f"base_model.model.conv.lora_{f}.weight"] for f in "AB")
    assert a.shape == (4, 4, 3) and b.shape == (6, 2, 1)
    assert np.count_nonzero(a[:2, 2:]) == np.count_nonzero(a[2:, :2]) == 0 and np.array_equal(a[:2, :2], a[2:, 2:])
    rng = np.random.default_rng(0)
    a[2:, 2:] = rng.normal(size=(2, 2, 3))
    save_file(tensors, path)
    (site,) = load_peft(directory, plan.sites).sites
    assert (site.rank, site.scale) == (4, 1.5)
    adapter = load_peft(directory, plan_peft(directory, conv, params, x))
    got = np.asarray(lj.merge({"conv": {"kernel": jnp.zeros((3, 2, 6))}}, adapter)["conv"]["kernel"])
    want = np.zeros((3, 2, 6))
    for o in range(6):
        g = o // 3
        want[:, :, o] = 1.5 * np.einsum("r,rck->kc", b[o, :, 0], a[2 * g : 2 * g + 2, 2 * g : 2 * g + 2])
    assert np.abs(got - want).max() < 1e-6 and np.abs(want).max() > 0.1
