"""A bias on B, and biases trained in full, against the formula and against the merged model."""

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
from lora_jax.sites import LORA_A, LORA_B, LORA_BIAS
from tests.core.harness import cast, config, normal

X = normal(5, 6)
SIZES = [2, 0, 3]


def conv(p, x):
    return lax.conv_general_dilated(x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


# The function, its weight and data, and how a bias of shape (*lead, *out) lies in the output.
PRODUCTS = {
    "dense": (lambda p, x: x @ p["w"], normal(6, 7), X, lambda b: b),
    "stored (out, in), times a number": (lambda p, x: x @ (0.5 * p["w"].T), normal(7, 6), X, lambda b: 0.5 * b),
    "heads, first": (lambda p, x: jnp.einsum("bd,hdk->hbk", x, p["w"]), normal(3, 6, 4), X, lambda b: b[:, None]),
    "reshaped": (lambda p, x: x @ p["w"].reshape(6, 8), normal(6, 2, 4), X, lambda b: b.reshape(8)),
    "a layer by its index": (lambda p, x: x @ p["w"][1], normal(2, 6, 7), X, lambda b: b[1]),
    "cut apart by outputs": (
        lambda p, x: jnp.concatenate([x @ w for w in jnp.split(p["w"], 2, axis=1)], -1), normal(6, 8), X, lambda b: b,
    ),
    "experts": (lambda p, x: jnp.einsum("td,edf->etf", x, p["w"]), normal(3, 6, 5), X, lambda b: b[:, None]),
    "grouped product": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array(SIZES, jnp.int32)), normal(3, 6, 5), X,
        lambda b: np.repeat(b, SIZES, axis=0),
    ),
    "convolution": (conv, normal(3, 6, 4), normal(2, 5, 6), lambda b: b),
}  # fmt: skip


def random(plan, seed=3):
    return lj.Adapter.from_leaves(
        {p: jnp.asarray(normal(*shape, seed=seed + n), plan.config.dtype)
         for n, (p, shape) in enumerate((p, s) for site in plan.sites for p, s in site.leaves.items())},
        plan.sites,
    )  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product(name):
    fn, w, x, placed = PRODUCTS[name]
    with jax.enable_x64(True):
        params, x = cast({"w": w}, np.float64), cast(x, np.float64)
        plan = lj.plan(fn, params, x, config=config(lora_bias=True, dtype="float64", dropout=0.3))
        adapter, site = random(plan), plan.sites[0]
        bias = adapter.vectors(site)[LORA_BIAS]
        without = np.asarray(fn({"w": jnp.asarray(reference.merged(site, w, *adapter.factors(site)))}, x))
        want = without + site.scale * placed(np.asarray(bias))
        bound = reference.tolerance(np.float64, 512) * np.abs(want).max()
        apply = lj.apply(fn, plan)
        assert reference.excess(jax.jit(apply)(params, adapter, x), want, bound) <= 1
        assert reference.excess(without, want, bound) > 1e3
        assert reference.excess(without + placed(np.asarray(bias)), want, bound) > 1e3  # s = 4/3 left out
        # The bias is not dropped: with A·B = 0 nothing depends on the key.
        zero = {p: adapter.leaf(p) * (LORA_BIAS in p) for p in site.leaves}
        got = apply(params, lj.Adapter.from_leaves(zero, plan.sites), x, key=jax.random.key(0))
        base = np.asarray(fn(params, x))
        assert reference.excess(got, base + want - without, bound) <= 1
        grads = jax.grad(lambda a: (apply(params, a, x) * want).sum())(adapter)
        size = reference.tolerance(np.float64, 512) * np.abs(want).sum() ** 2
        slopes = jax.grad(lambda b: (fn(params, x) * 0 + site.scale * _place(placed, b) * want).sum())(bias)
        assert reference.excess(grads.vectors(site)[LORA_BIAS], np.asarray(slopes), size) <= 1 and np.any(slopes)


def _place(placed, bias):
    """`placed` for a traced bias, which NumPy cannot repeat: it is linear."""
    eye = np.eye(bias.size).reshape(bias.size, *bias.shape)
    return jnp.tensordot(bias.reshape(-1), jnp.asarray(np.stack([placed(row) for row in eye])), 1)


@pytest.mark.parametrize("rslora", [False, True])
def test_other_scales_and_ranks(rslora):
    """Both leave what a bias on B does exact: it is scaled as B is, and no rank touches it."""
    with jax.enable_x64(True):
        w, x = normal(6, 7).astype(np.float64), X.astype(np.float64)

        def run(adapter):
            plan = lj.plan(fn, {"w": w}, x, config=config(lora_bias=True, dtype="float64"))
            return np.asarray(lj.apply(fn, plan)({"w": w}, adapter, x))

        fn = PRODUCTS["dense"][0]
        adapter = random(lj.plan(fn, {"w": w}, x, config=config(lora_bias=True, use_rslora=rslora, dtype="float64")))
        (site,) = adapter.sites
        bias, whole = np.asarray(adapter.vectors(site)[LORA_BIAS]), run(adapter)
        bound = reference.tolerance(np.float64, 512) * np.abs(whole).max()

        want = x @ w - 1.5 * (whole - x @ w)
        assert reference.excess(run(lj.rescale(adapter, -1.5)), want, bound) <= 1
        assert reference.excess(want, want - 2.5 * site.scale * bias, bound) > 1  # of a bias left as it was
        np.testing.assert_array_equal(run(lj.rescale(adapter, 0.0)), jnp.asarray(x) @ w)

        for grown in (lj.resize(adapter, 5), lj.resize(adapter, 5, key=jax.random.key(0))):
            assert grown.sites[0].rank == 5 and reference.excess(run(grown), whole, bound) <= 1
        u, s, vt = np.linalg.svd(reference.delta(site, *adapter.factors(site)))
        want = x @ (w + s[0] * np.outer(u[:, 0], vt[0])) + site.scale * bias
        assert reference.excess(run(lj.resize(adapter, 1)), want, bound) <= 1
        assert reference.excess(want, want - site.scale * bias, bound) > 1
        assert reference.excess(whole, want, bound) > 1


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(6, name="up")(x)), None


class Model(nn.Module):
    """Layers under scan and remat, a fan of heads, a convolution."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        x = nn.DenseGeneral((2, 4), name="heads")(x)
        return nn.LayerNorm()(nn.Conv(3, (2,), name="conv")(x))


def model():
    net = Model()
    params = net.init(jax.random.key(0), X)["params"]
    return net, jax.tree.map(lambda x: x + 0.1, params)


def test_merged_into_the_bases_bias():
    net, params = model()
    settings = lj.LoRAConfig(rank=2, alpha=3, target_modules=["up", "heads", "conv"], lora_bias=True)
    adapted, adapter = lj.linen.adapt(net, params, settings, X, key=jax.random.key(1))
    for site in adapter.sites:
        assert not np.any(adapter.vectors(site)[LORA_BIAS]) and np.any(adapter.factors(site)[0])
    adapter = random(adapted.plan)

    def run(adapter):
        return adapted.apply({"params": params, "lora": adapter}, X)

    merged = lj.merge(params, adapter)
    assert jnp.allclose(run(adapter), net.apply({"params": merged}, X), rtol=1e-4, atol=1e-4)
    lost = jax.tree_util.tree_map_with_path(lambda p, x: x * all(k.key != LORA_BIAS for k in p), adapter)
    assert not jnp.allclose(run(adapter), run(lost), rtol=1e-2, atol=1e-2)
    back = lj.unmerge(merged, adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, params)

    before = np.array(params["heads"]["bias"])
    broken = jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.full_like(x, jnp.inf) if "heads" in str(p) and LORA_BIAS in str(p) else x, adapter
    )
    assert not np.isfinite(lj.merge(params, broken)["heads"]["bias"]).any()
    with pytest.raises(ValueError, match=r"not finite in heads\.bias: the adapter diverged"):
        lj.merge(params, broken, safe=True)
    np.testing.assert_array_equal(params["heads"]["bias"], before)
    jax.tree.map(np.testing.assert_array_equal, lj.merge(params, adapter, safe=True), merged)

    bare = {"layer": {"kernel": jnp.asarray(normal(6, 7))}}

    def fn(p, x):
        return x @ p["layer"]["kernel"]

    plan = lj.plan(fn, bare, X, config=settings.replace(target_modules=["layer"]))
    with pytest.raises(ValueError, match=r"no bias for that of `lora_bias`: `layer.kernel` \(a `layer.bias` of shape"):
        lj.merge(bare, random(plan))


REFUSED = {
    "a part of the sum": (lambda p, x: x[:, :2] @ p["w"][:2], normal(6, 7)),
    "summed over outputs": (lambda p, x: (x @ p["w"]) @ p["w"].T, normal(6, 7)),
}


def test_where_a_bias_has_no_place():
    for fn, w in REFUSED.values():
        with pytest.raises(ValueError, match="multiplied in part, or by its outputs|a table, which is looked up"):
            plan = lj.plan(fn, {"w": w}, X, config=config(lora_bias=True))
            lj.apply(fn, plan)({"w": w}, random(plan), X)
    with pytest.raises(ValueError, match="`lora_bias` adds to the products.*formed in full: `w` .* by `tanh`"):
        lj.plan(lambda p, x: x @ jnp.tanh(p["w"]), {"w": normal(6, 7)}, X, config=config(lora_bias=True))
    with pytest.raises(ValueError, match="a table, which is looked up: `lora_bias` adds to products only"):
        lj.plan(lambda p, i: p["w"][i], {"w": normal(6, 7)}, np.array([1, 2]), config=config(lora_bias=True))
    with pytest.raises(ValueError, match="`lora_bias` with `use_dora`"):
        lj.LoRAConfig(lora_bias=True, use_dora=True)


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_biases_trained_in_full(which):
    net, params = model()
    settings = lj.LoRAConfig(rank=2, target_modules=["heads"], bias=which, init="random")
    adapted, adapter = lj.linen.adapt(net, params, settings, X, key=jax.random.key(1))
    full = {site.name for site in adapter.sites if site.is_full}
    everywhere = {"layers.up.bias", "heads.bias", "conv.bias", "LayerNorm_0.bias"}
    assert full == ({"heads.bias"} if which == "lora_only" else everywhere)

    def run(adapter):
        return adapted.apply({"params": params, "lora": adapter}, X)

    moved = jax.tree_util.tree_map_with_path(lambda p, x: x + 0.5 * (p[-1].key == "bias"), adapter)
    assert jnp.allclose(run(moved), net.apply({"params": lj.merge(params, moved)}, X), rtol=1e-4, atol=1e-4)
    assert not jnp.allclose(run(moved), run(adapter), rtol=1e-2, atol=1e-2)
    grads = jax.grad(lambda a: (run(a) ** 3).sum())(adapter)
    assert np.any(grads["heads"]["bias"]) and np.any(grads["heads"][LORA_A]["kernel"])

    with pytest.raises(ValueError, match="finds no parameter called `bias`"):
        lj.plan(lambda p, x: x @ p["w"], {"w": normal(6, 7)}, X, config=config(bias=which))
    with pytest.raises(ValueError, match="`bias='lora'` is unknown; did you mean lora_only"):
        lj.LoRAConfig(bias="lora")


def test_in_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return self.up(x)

    settings = lj.LoRAConfig(rank=2, lora_bias=True, bias="lora_only", init="random")
    net = lj.nnx.adapt(Net(nnx.Rngs(0)), settings, X, rngs=nnx.Rngs(1))
    adapter = lj.nnx.adapter_of(net)
    assert {p[-2:] for s in adapter.sites for p in s.leaves} == {
        (LORA_A, "kernel"), (LORA_B, "kernel"), (LORA_BIAS, "kernel"), ("up", "bias")
    }  # fmt: skip
    lj.nnx.set_adapter(net, jax.tree.map(lambda x: x + 0.5, adapter))
    assert jnp.allclose(net(X), lj.nnx.merge(net)(X), rtol=1e-5, atol=1e-5)
    assert not jnp.allclose(net(X), net.base(X), rtol=1e-2)
