"""DoRA on every kind of use, against the formed weight in float64: outputs, gradients of A, B, magnitude and base.

`check` also shows that a dropped magnitude, a dropped adapter and a wrong scale fail.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import lora_jax as lj
from lora_jax import reference
from lora_jax.ops.dropout import dropout
from lora_jax.sites import MAGNITUDE
from tests.core.harness import cast, check, config, normal, random_adapter

X = normal(5, 6)
IDS = np.array([[3, 0, 6], [6, 6, 1]])


def scanned(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(jax.checkpoint(jnp.matmul)(h, w)), None), x, params["w"])[0]


def grouped(params, x):
    return lax.ragged_dot(x, params["w"], jnp.array([2, 0, 3], jnp.int32))


def grouped_transposed(params, x):
    return lax.ragged_dot(x, params["w"].swapaxes(1, 2), jnp.array([2, 0, 3], jnp.int32))


def conv(params, x):
    return lax.conv_general_dilated(x, params["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def grouped_conv(params, x):
    return lax.conv_general_dilated(
        x, params["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )


USES = {
    "dense": (lambda p, x: x @ p["w"], normal(6, 7), X),
    "stored (out, in)": (lambda p, x: x @ p["w"].T, normal(7, 6), X),
    "heads": (lambda p, x: jnp.einsum("bd,hdk->bhk", x, p["w"]), normal(3, 6, 4), X),
    "a fused pair, cut apart": (lambda p, x: [x @ w for w in jnp.split(p["w"], 2, axis=1)], normal(6, 8), X),
    "rows cut apart": (lambda p, x: x[:, :2] @ p["w"][:2] + 2 * x[:, 2:] @ p["w"][2:], normal(6, 7), X),
    "reshaped in the model": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(6, 2, 4)), normal(6, 8), X),
    "times a number": (lambda p, x: x @ (p["w"] * 0.3), normal(6, 7), X),
    "scan over layers, remat": (scanned, normal(3, 6, 6), X),
    "a layer by its index": (lambda p, x: x @ p["w"][1] + jnp.tanh(x @ p["w"][0]), normal(2, 6, 7), X),
    "grouped product": (grouped, normal(3, 6, 5), X),
    "grouped product, transposed": (grouped_transposed, normal(3, 7, 6), X),
    "convolution": (conv, normal(3, 2, 3, 4), normal(2, 6, 5, 3)),
    "convolution in groups": (grouped_conv, normal(3, 2, 3, 4), normal(2, 6, 5, 6)),
    "embedding": (lambda p, ids: p["w"][ids], normal(7, 5), IDS),
    "tied head": (lambda p, ids: jnp.tanh(p["w"][ids]) @ p["w"].T, normal(7, 5), IDS),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_every_use(name):
    fn, w, x = USES[name]
    plan = check(fn, {"w": w}, x, use_dora=True)
    site = plan.sites[0]
    assert site.leaves[site.leaf_path(MAGNITUDE)] == (*site.sizes_of("l"), *site.sizes_of("o"))


def test_a_formed_weight():
    check(lambda p, x: x @ jnp.tanh(p["w"]), {"w": normal(6, 6)}, X, use_dora=True, materialised=["tanh"])


def planned(fn, params, *args, **changes):
    plan = lj.plan(fn, params, *args, config=config(use_dora=True, **changes))
    return plan, random_adapter(plan, np.dtype(changes.get("dtype", "float32")))


@pytest.mark.parametrize("name, init", [("dense", "kaiming"), ("grouped product", "random"), ("convolution", "random")])
def test_a_new_adapter_has_the_norms_of_its_sum(name, init):
    """The magnitude starts at |W + s·A·B|, so that c is 1 and the model is that of the plain low-rank weight."""
    fn, w, x = USES[name]
    params, x = cast({"w": w}, np.float32), cast(x, np.float32)
    plan = lj.plan(fn, params, x, config=config(use_dora=True, init=init))
    adapter = plan.init(jax.random.key(0), params)
    site = plan.sites[0]
    a, b = adapter.factors(site)
    want = reference.column_norms(site, w, a, b)
    assert reference.excess(adapter.vectors(site)[MAGNITUDE], want, reference.tolerance("float32", w.size) * want) <= 1
    plain = jax.jit(fn)({"w": reference.merged(site, w, a, b).astype(np.float32)}, x)
    got = jax.jit(lj.apply(fn, plan))(params, adapter, x)
    bound = reference.tolerance("float32", w.size) * float(jnp.abs(plain).max())
    assert reference.excess(got, np.asarray(plain, np.float64), bound) <= 1
    with pytest.raises(ValueError, match="`use_dora` starts at the norms of w: pass the base"):
        plan.init(jax.random.key(0))


@pytest.mark.parametrize("dtype, stored", [("float32", "in out"), ("bfloat16", "in out"), ("float32", "out in")])
def test_merge_and_unmerge(dtype, stored):
    params = cast({"w": normal(48, 40)}, dtype)
    fn, rows = (lambda p, x: x @ p["w"], 48) if stored == "in out" else (lambda p, x: x @ p["w"].T, 40)
    plan, adapter = planned(fn, params, cast(normal(2, rows), dtype))
    site = plan.sites[0]
    merged = lj.merge(params, adapter)
    want = reference.merged(site, params["w"], *adapter.factors(site), adapter.vectors(site)[MAGNITUDE])
    bound = reference.tolerance(dtype, 64) * np.abs(want).max()
    assert reference.excess(merged["w"], want, bound) <= 1
    assert reference.excess(reference.merged(site, params["w"], *adapter.factors(site)), want, bound) > 10
    back = lj.unmerge(merged, adapter, lj.weight_norms(params, adapter))
    again = 4 * bound * np.abs(np.asarray(params["w"], np.float64)).max()
    assert reference.excess(back["w"], np.asarray(params["w"], np.float64), again) <= 1
    with pytest.raises(ValueError, match="cannot unmerge w: DoRA replaced the lengths.*weight_norms"):
        lj.unmerge(merged, adapter)
    erased = lj.Adapter.from_leaves({p: adapter.leaf(p) * (p[0] != MAGNITUDE) for p in site.leaves}, plan.sites)
    with pytest.raises(ValueError, match="magnitude of 0 has erased"):
        lj.unmerge(merged, erased, lj.weight_norms(params, adapter))


RATE = 0.3
DROPPED = {
    "dense": USES["dense"][:2] + (normal(9, 6),),
    "heads": USES["heads"],
    "grouped product": USES["grouped product"],
    "convolution": USES["convolution"],
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_is_pefts(name):
    """x·W + (c - 1)·drop(x)·W + c·s·drop(x)·A·B: the base's own product is of the whole input."""
    fn, w, x = DROPPED[name]
    columns = (3,) if name == "convolution" else (-1,)
    with jax.enable_x64(True):
        params, x = cast({"w": w}, np.float64), cast(x, np.float64)
        plan, adapter = planned(fn, params, x, dtype="float64", dropout=RATE)
        site = plan.sites[0]
        key = jax.random.key(4)
        own = jax.random.fold_in(jax.random.fold_in(key, site.seed), 0)
        dropped = jax.jit(lambda x, key: dropout(x, key, RATE, columns))(x, own)
        a, b = adapter.factors(site)
        c = reference.dora_scale(site, w, a, b, adapter.vectors(site)[MAGNITUDE])
        change = reference.delta(site, a, b)

        compiled = jax.jit(fn)

        def at(weight, x=x):
            return np.asarray(compiled({"w": np.asarray(weight, np.float64)}, x))

        want = at(w) + at((c - 1) * w, dropped) + at(c * change, dropped)
        bound = reference.tolerance(np.float64, 512) * np.abs(want).max()
        adapted = jax.jit(lj.apply(fn, plan))
        got = adapted(params, adapter, x, key=key)
        assert reference.excess(got, want, bound) <= 1
        assert reference.excess(at(c * (w + change)), want, bound) > 1e3  # no dropout
        assert reference.excess(at(c * w) + at(c * change, dropped), want, bound) > 1e3  # the branch alone
        assert reference.excess(at(c * (w + change), dropped), want, bound) > 1e3  # everything
        without = adapted(params, adapter, x)
        assert reference.excess(without, at(c * (w + change)), bound) <= 1


def test_a_bfloat16_base():
    """The norm comes from a 16-bit weight without a float32 copy of it; the product is rounded once more."""
    params, x = cast({"w": normal(64, 48)}, "bfloat16"), cast(normal(32, 64), "bfloat16")

    def fn(p, x):
        return x @ p["w"]

    plan, adapter = planned(fn, params, x)
    site = plan.sites[0]
    want = np.asarray(x, np.float64) @ reference.merged(
        site, params["w"], *adapter.factors(site), adapter.vectors(site)[MAGNITUDE]
    )
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(params["w"], np.float64)) * 4
    bound = reference.tolerance("bfloat16", 128) * size
    adapted = jax.jit(lj.apply(fn, plan))
    assert reference.excess(adapted(params, adapter, x), want, bound) <= 1
    unscaled = np.asarray(x, np.float64) @ reference.merged(site, params["w"], *adapter.factors(site))
    assert reference.excess(unscaled, want, bound) > 1


def test_no_gradient_flows_through_the_norm():
    """Along a multiple of V = W + s·A·B the norm changes as fast as V, and the detached gradient must not see it."""
    with jax.enable_x64(True):
        params, x = cast({"w": np.zeros((6, 7))}, np.float64), cast(X, np.float64)

        def fn(p, x):
            return x @ p["w"]

        plan, adapter = planned(fn, params, x, dtype="float64")
        site = plan.sites[0]
        grads = jax.jit(jax.grad(lambda a: (lj.apply(fn, plan)(params, a, x) ** 2).sum()))(adapter)
        # W = 0: doubling B leaves W' as it is, so with the norm's own gradient B's would be zero along B.
        along = float(jnp.vdot(grads.factors(site)[1], adapter.factors(site)[1]))
        assert abs(along) > 1


def test_columns_of_zeros():
    """A weight that starts at zero has no direction: c is 1, nothing is NaN, and B learns."""
    params = cast({"w": np.zeros((6, 7))}, np.float32)

    def fn(p, x):
        return x @ p["w"]

    plan = lj.plan(fn, params, X, config=config(use_dora=True, init="kaiming"))
    adapter = plan.init(jax.random.key(0), params)
    y, grads = jax.jit(jax.value_and_grad(lambda a: (lj.apply(fn, plan)(params, a, X) + 1).sum()))(adapter)
    assert y == 35 and all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    assert jnp.abs(grads.factors(plan.sites[0])[1]).max() > 0


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_product_is_the_low_rank_one(rate):
    """Whatever implementation runs that: `explain` shows the choice, twice where dropout needs a second product."""
    params, x = cast({"w": normal(6, 7)}, np.float32), cast(X, np.float32)

    def fn(p, x):
        return x @ p["w"]

    plan, adapter = planned(fn, params, x, dropout=rate)
    key = jax.random.key(0) if rate else None
    choices = lj.explain(fn, plan)(params, adapter, x, key=key).choices
    assert [(c.name, c.implementation) for c in choices] == [("w", "xla")] * (2 if rate else 1)
    assert all("mosaic_gpu" in c.reasons for c in choices)
    with pytest.raises(ValueError, match="'mosaic_gpu'` can't run the product of `w`"):
        lj.apply(fn, plan, implementation="mosaic_gpu")(params, adapter, x, key=key)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(jnp.tanh(nn.Dense(8)(x)))


def test_in_linen_and_nnx():
    model = Model()
    x = jnp.asarray(X)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape)), abstract)
    settings = lj.LoRAConfig(rank=2, use_dora=True, init="random")
    adapted, adapter = lj.linen.adapt(model, params, settings, x, key=jax.random.key(1))
    doubled = jax.tree.map(lambda v: 2 * v, adapter)

    @jax.jit
    def call(adapter):
        return adapted.apply({"params": params, "lora": adapter}, x)

    want = jax.jit(model.apply)({"params": lj.merge(params, doubled)}, x)
    np.testing.assert_allclose(call(doubled), want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(call(doubled), call(adapter), rtol=1e-2)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    net = lj.nnx.adapt(Net(nnx.Rngs(0)), settings, x, rngs=nnx.Rngs(1))
    lj.nnx.set_adapter(net, jax.tree.map(lambda v: 2 * v, lj.nnx.adapter_of(net)))
    got, merged, base = (nnx.jit(lambda model, x: model(x))(each, x) for each in (net, lj.nnx.merge(net), net.base))
    np.testing.assert_allclose(got, merged, rtol=1e-5, atol=1e-5)
    assert not np.allclose(got, base, rtol=1e-2)
    plain = lj.nnx.adapt(Net(nnx.Rngs(0)), settings.replace(use_dora=False), x, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="differ in down/lora_magnitude_vector/kernel"):
        lj.nnx.set_adapter(plain, lj.nnx.adapter_of(net))
