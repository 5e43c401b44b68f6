"""The modules of linen and nnx, unmodified."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from tests.core.harness import check, normal

KEY = np.array([0, 1], np.uint32)


def linen(model: nn.Module, *args: Any) -> tuple[Any, Any]:
    """A function of its parameters, and random parameters (Flax starts biases at zero)."""
    tree = jax.eval_shape(lambda: model.init(KEY, *args))["params"]
    params = jax.tree.map(lambda leaf: normal(*leaf.shape) / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 1), tree)
    return (lambda p, *a, **kwargs: model.apply({"params": p}, *a, **kwargs)), params


def nnx_fn(model: nnx.Module) -> tuple[Any, Any]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return (lambda p, *a: nnx.merge(graph, p, rest)(*a)), params


def summary(plan) -> dict[str, str]:
    return {site.name: site.roles for site in plan.sites}


X = normal(2, 5, 6)
GENERAL = {
    "one to two": (nn.DenseGeneral((3, 4)), X, "ioo"),
    "two to one": (nn.DenseGeneral(4, axis=(-2, -1)), X, "iio"),
    "two to two": (nn.DenseGeneral((3, 4), axis=(1, 2)), X, "iioo"),
    "first axis": (nn.DenseGeneral(4, axis=1), X, "io"),
    "batched": (nn.DenseGeneral((3,), axis=2, batch_dims=(0,)), X, "lio"),
    "Dense": (nn.Dense(4), X, "io"),
    "Einsum": (nn.Einsum((6, 3, 4), "btd,dnh->btnh"), X, "ioo"),
    "Einsum, weight transposed": (nn.Einsum((3, 4, 6), "btd,nhd->btnh"), X, "ooi"),
    "Einsum, batched": (nn.Einsum((5, 6, 3), "btd,tdn->btn"), X, "lio"),
}


@pytest.mark.parametrize("name", GENERAL)
def test_linen_projection(name):
    model, x, roles = GENERAL[name]
    fn, params = linen(model, x)
    assert summary(check(fn, params, x)) == {"kernel": roles}


NNX_GENERAL = {
    "one to two": (lambda r: nnx.LinearGeneral(6, (3, 4), rngs=r), "ioo"),
    "two to one": (lambda r: nnx.LinearGeneral((5, 6), 4, axis=(-2, -1), rngs=r), "iio"),
    "batched": (lambda r: nnx.LinearGeneral(6, 3, batch_axis={0: 2}, rngs=r), "lio"),
    "Linear": (lambda r: nnx.Linear(6, 4, rngs=r), "io"),
    "Einsum": (lambda r: nnx.Einsum("btd,dnh->btnh", (6, 3, 4), (3, 4), rngs=r), "ioo"),
    "Einsum, weight transposed": (lambda r: nnx.Einsum("btd,nhd->btnh", (3, 4, 6), None, rngs=r), "ooi"),
}


@pytest.mark.parametrize("name", NNX_GENERAL)
def test_nnx_projection(name):
    make, roles = NNX_GENERAL[name]
    fn, params = nnx_fn(make(nnx.Rngs(0)))
    assert summary(check(fn, params, X)) == {"kernel": roles}


PROJECTIONS = {"query": "ioo", "key": "ioo", "value": "ioo", "out": "iio"}


def test_linen_attention():
    fn, params = linen(nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12), X)
    assert summary(check(fn, params, X)) == {f"{n}.kernel": r for n, r in sorted(PROJECTIONS.items())}


def test_linen_cross_attention_with_a_mask():
    memory, mask = normal(2, 4, 6, seed=1), np.tri(5, 4, dtype=bool)[None, None]
    model = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)
    fn, params = linen(model, X, memory)
    plan = (
        check(lambda p, x, m, mask: fn(p, x, m, mask=mask), params, X, memory, mask)
        if False
        else check(lambda p, x, m, mask: model.apply({"params": p}, x, m, mask=mask), params, X, memory, mask)
    )
    assert len(plan.sites) == 4


def test_nnx_attention():
    model = nnx.MultiHeadAttention(3, 6, 12, decode=False, rngs=nnx.Rngs(0))
    fn, params = nnx_fn(model)
    assert summary(check(fn, params, X)) == {f"{n}.kernel": r for n, r in sorted(PROJECTIONS.items())}


class Conv1D(nn.Module):
    """As Hugging Face's Flax GPT-2 writes it: kernels are (out, in)."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = jnp.asarray(kernel.transpose(), x.dtype)
        return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + jnp.asarray(bias, x.dtype)


def test_gpt2_kernels_are_out_in():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = jnp.split(Conv1D(12, name="c_attn")(x), 3, axis=-1)
            return Conv1D(6, name="c_proj")(jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v)

    fn, params = linen(Block(), X)
    plan = check(fn, params, X)
    assert {s.name: (s.roles, s.a_shape, s.b_shape) for s in plan.sites} == {
        "c_attn.kernel": ("oi", (6, 3), (3, 12)),
        "c_proj.kernel": ("oi", (4, 3), (3, 6)),
    }


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(h), None


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("remat", [False, True])
def test_linen_scan(axis, remat):
    block = nn.remat(Mlp, prevent_cse=False) if remat else Mlp
    stack = nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)()
    fn, params = linen(stack, X, None)
    plan = check(lambda p, x: fn(p, x, None)[0], params, X)
    roles = {0: "lio", 1: "ilo"}[axis]
    assert summary(plan) == {"down.kernel": roles, "up.kernel": roles}
    assert {s.a_shape for s in plan.sites} == {(3, 6, 3), (3, 8, 3)}  # lead axes come first in the factors


def test_linen_scan_with_shared_weights():
    stack = nn.scan(Mlp, variable_broadcast="params", split_rngs={"params": False}, length=3)()
    fn, params = linen(stack, X, None)
    assert summary(check(lambda p, x: fn(p, x, None)[0], params, X)) == {"down.kernel": "io", "up.kernel": "io"}


def test_linen_vmap():
    ensemble = nn.vmap(Mlp, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)()
    fn, params = linen(ensemble, X)
    assert summary(check(lambda p, x: fn(p, x)[0], params, X)) == {"down.kernel": "lio", "up.kernel": "lio"}


def test_linen_recurrence():
    fn, params = linen(nn.RNN(nn.GRUCell(4)), X)
    plan = check(lambda p, x, h: fn(p, x, initial_carry=h), params, X, normal(2, 4))
    assert set(summary(plan).values()) == {"io"}


def test_linen_bilinear():
    class Bilinear(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            w = self.param("w", nn.initializers.normal(), (4, 6, 3))
            return jnp.einsum("bti,oij,btj->bto", x, w, y)

    fn, params = linen(Bilinear(), X, X[..., :3])
    check(fn, params, X, X[..., :3])


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def nnx_stack() -> NnxBlock:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return NnxBlock(rngs)

    return make(nnx.Rngs(0))


@pytest.mark.parametrize("remat", [False, True])
def test_nnx_scan(remat):
    graph, params, rest = nnx.split(nnx_stack(), nnx.Param, ...)

    def fn(p, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return (nnx.remat(NnxBlock.__call__) if remat else NnxBlock.__call__)(block, x)

        return forward(nnx.merge(graph, p, rest), x)

    assert summary(check(fn, params, X)) == {"down.kernel": "lio", "up.kernel": "lio"}


def test_nnx_vmap():
    graph, params, rest = nnx.split(nnx_stack(), nnx.Param, ...)

    def fn(p, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(nnx.merge(graph, p, rest), x)

    assert summary(check(fn, params, X)) == {"down.kernel": "lio", "up.kernel": "lio"}


def test_nnx_jit_inside():
    block = NnxBlock(nnx.Rngs(0))
    graph, params, rest = nnx.split(block, nnx.Param, ...)
    jitted = nnx.jit(lambda block, x: block(x))
    assert len(check(lambda p, x: jitted(nnx.merge(graph, p, rest), x), params, X).sites) == 2


def test_list_of_layers():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return jnp.tanh(self.layers[0](x)) + self.layers[1](x)

    fn, params = nnx_fn(Model(nnx.Rngs(0)))
    assert summary(check(fn, params, X)) == {"layers.0.kernel": "io", "layers.1.kernel": "io"}


def test_weight_norm_is_formed_and_reported():
    """The effective kernel is a nonlinear function of the adapted one."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(4, name="dense"))(x)

    fn, params = linen(Model(), X)
    plan = check(fn, params, X, materialised=["mul"])
    assert [name for name, _, _ in plan.materialised] == ["dense.kernel"]


def test_spectral_norm_is_not():
    """A kernel over its largest singular value, which is a product with vectors."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.SpectralNorm(nn.Dense(4, name="dense"), collection_name="stats")(x, update_stats=False)

    variables = Model().init(jax.random.key(0), X)
    params = {"dense": {"kernel": normal(6, 4), "bias": normal(4)}}
    check(lambda p, x, stats: Model().apply({"params": p, "stats": stats}, x), params, X, variables["stats"])
