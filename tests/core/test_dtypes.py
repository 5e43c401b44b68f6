"""Half precision, mixed precision and float64: rounded where it should be, and no more often."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax import _compat, reference
from lora_jax.ops import lora_dot
from lora_jax.sites import LORA_A, LORA_B
from tests.core.dataflow import walk
from tests.core.harness import cast, config, normal, random_adapter

SIZES = np.array([4, 2, 3], np.int32)
IDS = np.array([[3, 0, 6], [6, 6, 1]])
CONV = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

# name: (function linear in its weight, weight shape, data, number of terms summed)
USES = {
    "matmul": (lambda w, x: x @ w, (70, 24), normal(9, 70), 70),
    "weight first": (lambda w, x: jnp.einsum("df,bd->bf", w, x), (70, 24), normal(9, 70), 70),
    "transposed": (lambda w, x: x @ w.T, (24, 70), normal(9, 70), 70),
    "heads": (lambda w, x: jnp.einsum("btd,dnh->btnh", x, w), (32, 3, 8), normal(2, 5, 32), 32),
    "experts": (lambda w, x: jnp.einsum("etd,edf->etf", x, w), (3, 32, 8), normal(3, 5, 32), 32),
    "grouped": (lambda w, x: lax.ragged_dot(x, w, jnp.asarray(SIZES)), (3, 32, 8), normal(9, 32), 32),
    "lookup": (lambda w, ids: w[ids], (7, 16), IDS, 8),
    "conv": (lambda w, x: lax.conv_general_dilated(x, w, **CONV), (3, 3, 6, 8), normal(2, 5, 4, 6), 54),
    "grouped conv": (
        lambda w, x: lax.conv_general_dilated(x, w, feature_group_count=2, **CONV),
        (3, 3, 3, 8), normal(2, 5, 4, 6), 27,
    ),
    "scan": (lambda w, x: lax.scan(lambda s, r: (s, r[1] @ r[0]), 0, (w, x))[1], (3, 32, 8), normal(3, 5, 32), 32),
}  # fmt: skip

# (base, activations, factors): what is rounded to, and the dtype of the result.
MIXES = {
    "float32": ("float32", "float32", "float32"),
    "bfloat16 base, float32 factors": ("bfloat16", "bfloat16", "float32"),
    "bfloat16 throughout": ("bfloat16", "bfloat16", "bfloat16"),
    "float16 base, float32 factors": ("float16", "float16", "float32"),
    "float32 base, bfloat16 factors": ("float32", "float32", "bfloat16"),
}


def wide(tree):
    """The values as they are, in float64."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64) if np.asarray(x).dtype.kind in "fV" else x, tree)


# Every use in the two common mixes, the kinds of code path in the others.
CASES = [(name, mix) for name in USES for mix in ("float32", "bfloat16 base, float32 factors")]
CASES += [(name, mix) for name in ("matmul", "lookup", "conv") for mix in MIXES if (name, mix) not in CASES]


@pytest.mark.parametrize("name, mix", CASES)
def test_rounding(name, mix):
    use, shape, data, terms = USES[name]
    base, activations, factors = MIXES[mix]
    params, x = cast({"w": normal(*shape)}, base), cast(data, activations)

    def fn(p, x):
        return use(p["w"], x)

    plan = lj.plan(fn, params, x, config=config(dtype=factors))
    assert not plan.materialised
    adapter = random_adapter(plan, factors)
    site = plan.sites[0]
    a, b = adapter.factors(site)
    out = jax.eval_shape(fn, params, x)
    dy = cast(normal(*out.shape, seed=5), out.dtype)

    @jax.jit
    def run(params, adapter, x):
        y, vjp = jax.vjp(lambda p, a: lj.apply(fn, plan)(p, a, x), params, adapter)
        return y, *vjp(dy)

    got, got_params, got_adapter = run(params, adapter, x)
    assert got.dtype == out.dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(got_adapter)} == {jnp.dtype(factors)}
    assert got_params["w"].dtype == params["w"].dtype

    # Linear in weight and data alike, so the magnitude is the same function of absolute values.
    with jax.enable_x64(True):
        run64 = jax.jit(lambda w, x, dy: (lambda y, vjp: (y, vjp(dy)[0]))(*jax.vjp(lambda w: use(w, x), w)))
        w64, x64, dy64 = wide(params["w"]), wide(x), wide(dy)
        merged, sum_of_sizes = (reference.merged(site, *v) for v in ((w64, a, b), map(abs, wide((w64, a, b)))))
        exact = [np.asarray(v) for v in run64(merged, x64, dy64)]
        sizes = [np.asarray(v) for v in run64(sum_of_sizes, abs(x64), abs(dy64))]
        plain = np.asarray(run64(w64, x64, dy64)[0])
        doubled = np.asarray(run64(2 * merged - w64, x64, dy64)[0])

    compute = base if name == "lookup" else activations
    tolerance = reference.tolerance(compute, terms)
    bound = tolerance * sizes[0]
    assert reference.excess(got, exact[0], bound) <= 1
    assert reference.excess(plain, exact[0], bound) > 1  # a dropped adapter
    assert reference.excess(doubled, exact[0], bound) > 1  # a wrong scale

    assert reference.excess(got_params["w"], exact[1], reference.tolerance(base, terms) * sizes[1]) <= 1
    wanted = reference.factor_gradients(site, a, b, exact[1])
    magnitudes = reference.factor_gradients(site, abs(wide(a)), abs(wide(b)), sizes[1])
    # Each element of a factor's gradient sums over elements of the weight's gradient, and is rounded to the factor.
    by = max(reference.tolerance(dtype, terms + 9 * max(shape)) for dtype in (compute, factors))
    for factor, want, size in zip(got_adapter.factors(site), wanted, magnitudes, strict=True):
        assert reference.excess(factor, want, by * size) <= 1
        assert reference.excess(0 * want, want, by * size) > 1


def test_cast_of_a_float32_base():
    """Flax's `dtype=bfloat16` over float32 parameters: the branch computes in bfloat16 from float32 factors."""
    params, x = cast({"w": normal(70, 24)}, np.float32), cast(normal(9, 70), ml_dtypes.bfloat16)

    def fn(p, x):
        return x @ p["w"].astype(jnp.bfloat16)

    plan = lj.plan(fn, params, x, config=config())
    adapter = random_adapter(plan, np.float32)
    got = jax.jit(lj.apply(fn, plan))(params, adapter, x)
    assert got.dtype == jnp.bfloat16 and not plan.materialised
    site = plan.sites[0]
    a, b = adapter.factors(site)
    want, magnitude = reference.lora_dot(x, params["w"], a, b, site.scale)
    bound = reference.tolerance("bfloat16", 70) * magnitude
    assert reference.excess(got, want, bound) <= 1 < reference.excess(fn(params, x), want, bound)


def test_activations_wider_than_the_base():
    """float32 data on a bfloat16 kernel: jax computes in float32, and so does the branch."""
    params, x = cast({"w": normal(70, 24)}, ml_dtypes.bfloat16), cast(normal(9, 70), np.float32)

    def fn(p, x):
        return x @ p["w"]

    plan = lj.plan(fn, params, x, config=config())
    adapter = random_adapter(plan, np.float32)
    a, b = adapter.factors(plan.sites[0])
    want, magnitude = reference.lora_dot(x, params["w"], a, b, plan.sites[0].scale)
    got = jax.jit(lj.apply(fn, plan))(params, adapter, x)
    assert got.dtype == jnp.float32
    assert reference.excess(got, want, reference.tolerance("float32", 70) * magnitude) <= 1


def test_small_updates_survive_a_bfloat16_base():
    """x·W + s·x·A·B keeps an update that W + s·A·B in bfloat16 would round away."""
    w = np.ones((64, 8))

    def fn(p, x):
        return jnp.dot(x, p["w"], preferred_element_type=jnp.float32)

    params, x = cast({"w": w}, ml_dtypes.bfloat16), cast(np.ones((1, 64)), ml_dtypes.bfloat16)
    plan = lj.plan(fn, params, x, config=config(rank=1, alpha=1.0))
    site = plan.sites[0]
    values = {site.leaf_path(LORA_A): jnp.ones((64, 1)), site.leaf_path(LORA_B): jnp.full((1, 8), 2**-11)}
    adapter = lj.Adapter.from_leaves(values, plan.sites)
    np.testing.assert_array_equal(lj.apply(fn, plan)(params, adapter, x), np.full((1, 8), 64 + 64 * 2**-11))
    np.testing.assert_array_equal(fn(lj.merge(params, adapter), x), np.full((1, 8), 64))  # the merged sum rounds to W


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_factors_have_the_dtype_asked_for(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = cast({"w": normal(6, 5), "e": normal(7, 6)}, np.float32)
        fn = lambda p, ids: p["e"][ids] @ p["w"]  # noqa: E731
        plan = lj.plan(fn, params, IDS, config=config(dtype=dtype))
        adapter = jax.eval_shape(plan.init, jax.random.key(0))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(adapter)} == {dtype}


@pytest.mark.parametrize("init", ["kaiming", "xavier", "gaussian", "orthogonal"])
def test_new_adapters_change_nothing(init):
    params, x = cast({"w": normal(16, 12), "e": normal(7, 16)}, ml_dtypes.bfloat16), IDS

    def fn(p, ids):
        return p["e"][ids] @ p["w"]

    plan = lj.plan(fn, params, x, config=config(init=init, rank=4))
    adapter = plan.init(jax.random.key(3))
    run = jax.jit(lj.apply(fn, plan))
    if init == "orthogonal":  # A·B is zero, A and B are not
        assert all(np.any(leaf) for leaf in jax.tree.leaves(adapter))
        for site in plan.sites:
            a, b = (np.asarray(v, np.float64) for v in adapter.factors(site))
            assert np.max(abs(a @ b)) <= reference.tolerance("float32", 16) * np.max(abs(a) @ abs(b))
    else:
        np.testing.assert_array_equal(run(params, adapter, x), jax.jit(fn)(params, x))


def test_lora_dot():
    """The public op against the oracle: result, gradients, and shapes that disagree."""
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 5, 48), (48, 40), (48, 5), (5, 40)))
    dy = rng.standard_normal((2, 5, 40)).astype(np.float32)
    y, vjp = jax.vjp(lambda *v: lora_dot(*v, scale=0.7), x, w, a, b)
    want, magnitude = reference.lora_dot(x, w, a, b, 0.7)
    bound = reference.tolerance("float32", 53) * magnitude
    assert reference.excess(y, want, bound) <= 1 < reference.excess(lora_dot(x, w, a, b), want, bound)
    wanted = reference.lora_dot_gradients(x, w, a, b, 0.7, dy)
    for got, (want, magnitude) in zip(vjp(dy), (wanted[n] for n in "xwab"), strict=True):
        bound = reference.tolerance("float32", 100) * magnitude
        assert reference.excess(got, want, bound) <= 1 < reference.excess(0.7 * got, want, bound)
    with pytest.raises(ValueError, match=r"x \(2, 5, 48\), kernel \(48, 40\), a \(5, 48\)"):
        lora_dot(x, w, a.T, b)
    with pytest.raises(ValueError, match="dropout_rate=1.0"):
        lora_dot(x, w, a, b, dropout_rate=1.0)
    with pytest.raises(ValueError, match="implementation='tpu'"):
        lora_dot(x, w, a, b, implementation="tpu")


def test_lora_dot_learns_its_scale():
    """A traced scale has a gradient, and is not rounded to the activations' dtype."""
    x, w, a, b = normal(4, 6), normal(6, 5), normal(6, 2), normal(2, 5)
    got = jax.grad(lambda s: lora_dot(x, w, a, b, scale=s).sum())(jnp.float32(0.3))
    want = np.sum((x.astype(np.float64) @ a) @ b)
    assert abs(got - want) <= reference.tolerance("float32", 120) * np.sum((abs(x) @ abs(a)) @ abs(b))


ARGS = [normal(4, 6), normal(6, 5), normal(6, 2), normal(2, 5)]


@pytest.mark.parametrize("asked", [(2,), (3,), (2, 3), (0,), (1,), (0, 1, 2, 3)])
def test_only_gradients_asked_for_are_computed(asked):
    """A weight's gradient is a product of the size of the weight: nobody asks, nobody pays."""
    gradient = jax.make_jaxpr(jax.grad(lambda *v: lora_dot(*v).sum(), argnums=asked))(*ARGS)
    assert ((6, 5) in product_shapes(gradient)) == (1 in asked)


def product_shapes(closed):
    jaxpr, _ = _compat.open_jaxpr(closed)
    eqns = walk(jaxpr, [frozenset()] * len(jaxpr.invars))
    return {eqn.outvars[0].aval.shape for eqn, _ in eqns if eqn.primitive.name == "dot_general"}


def test_the_backward_pass_keeps_no_more_than_it_needs():
    """The weights, x and x·A: nothing of the size of the result. The shape of one element tells what is wanted."""
    _, vjp = jax.vjp(lora_dot, *map(jnp.asarray, ARGS))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(vjp) if leaf.size > 1) == [
        (2, 5), (4, 2), (4, 6), (6, 2), (6, 5),
    ]  # fmt: skip
