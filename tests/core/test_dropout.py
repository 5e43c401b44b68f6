"""Dropout: of the low-rank branch only, inverted, off without a key, the same mask wherever it is computed again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax import reference
from lora_jax.ops import dropout, lora_dot
from tests.core.harness import cast, config, normal, random_adapter

RATE = 0.25
KEY = jax.random.key(11)
X = normal(64, 48)
W = {"w": normal(48, 32)}


def adapted(fn, params, *args, **changes):
    """With dropout: the adapted function as one program, and what it takes."""
    params = cast(params, np.float32)
    plan = lj.plan(fn, params, *args, config=config(dropout=RATE, **changes))
    return jax.jit(lj.apply(fn, plan)), params, random_adapter(plan, np.float32), plan


def one(p, x):
    return x @ p["w"]


def branch(call, params, adapter, x, key):
    """What the adapter adds, with its mask."""
    return np.asarray(call(params, adapter, x, key=key), np.float64) - np.asarray(one(params, x), np.float64)


def mask_of(call, params, plan, key, shape):
    """The mask of a single product, read off an adapter that adds its dropped input times a number to the output."""
    site = plan.sites[0]
    rank = site.rank
    a = np.zeros(site.a_shape, np.float32)
    b = np.zeros(site.b_shape, np.float32)
    rows = []
    for start in range(0, shape[1], rank):  # `rank` input columns at a time
        a[:], b[:] = 0, 0
        for r in range(min(rank, shape[1] - start)):
            a[start + r, r], b[r, r] = 1, 1 / site.scale
        leaves = {site.leaf_path("lora_A"): jnp.asarray(a), site.leaf_path("lora_B"): jnp.asarray(b)}
        extra = branch(call, params, lj.Adapter.from_leaves(leaves, plan.sites), jnp.ones(shape), key)
        rows.append(extra[:, : min(rank, shape[1] - start)])
    return np.concatenate(rows, axis=1)


def test_mask_is_inverted_and_of_the_right_rate():
    call, params, _, plan = adapted(one, W, X)
    mask = mask_of(call, cast({"w": np.zeros((48, 32))}, np.float32), plan, KEY, X.shape)
    kept = 1 / (1 - RATE)
    assert np.all(np.isclose(mask, 0, atol=1e-5) | np.isclose(mask, kept, rtol=1e-5))
    # 3072 draws: five standard deviations of the mean.
    assert abs(mask.mean() - 1) < 5 * np.sqrt(RATE / (1 - RATE) / mask.size)


def test_explicit_mask_formula():
    """Output and gradients against x·W + s·(mask*x)·A·B, with the mask read off the op itself."""
    call, params, adapter, plan = adapted(one, W, X)
    site = plan.sites[0]
    a, b = adapter.factors(site)
    mask = mask_of(call, cast({"w": np.zeros((48, 32))}, np.float32), plan, KEY, X.shape)
    mask = np.where(mask > 0.5, 1 / (1 - RATE), 0.0)
    want, magnitude = reference.lora_dot(X, params["w"], a, b, site.scale, mask)
    bound = reference.tolerance("float32", 64) * magnitude
    dy = normal(64, 32, seed=3)

    @jax.jit
    def run(*operands):
        y, vjp = jax.vjp(lambda p, adapter, x: call(p, adapter, x, key=KEY), *operands)
        return y, *vjp(dy)

    y, dp, da, dx = run(params, adapter, X)
    assert reference.excess(y, want, bound) <= 1
    without, _ = reference.lora_dot(X, params["w"], a, b, site.scale)
    assert reference.excess(without, want, bound) > 1  # no dropout
    dropped_everywhere = (X * mask) @ np.asarray(params["w"]) + want - X @ np.asarray(params["w"])
    assert reference.excess(dropped_everywhere, want, bound) > 1  # dropout on the base as well

    wanted = reference.lora_dot_gradients(X, params["w"], a, b, site.scale, dy, mask)
    got = {"w": dp["w"], "x": dx, **dict(zip("ab", da.factors(site), strict=True))}
    for name, value in got.items():
        exact, size = wanted[name]
        assert reference.excess(value, exact, reference.tolerance("float32", 128) * size) <= 1, name
    maskless = reference.lora_dot_gradients(X, params["w"], a, b, site.scale, dy)
    for name in "xab":
        size = wanted[name][1]
        assert reference.excess(got[name], maskless[name][0], reference.tolerance("float32", 128) * size) > 1, name


def test_off_without_a_key():
    call, params, adapter, plan = adapted(one, W, X)
    plain = jax.jit(lj.apply(one, lj.plan(one, params, X, config=config())))
    np.testing.assert_array_equal(call(params, adapter, X), plain(params, adapter, X))
    assert np.any(call(params, adapter, X) != call(params, adapter, X, key=KEY))
    assert plan.config.dropout == RATE


def test_a_key_without_dropout_changes_nothing():
    params = cast(W, np.float32)
    plan = lj.plan(one, params, X, config=config())
    call, adapter = jax.jit(lj.apply(one, plan)), random_adapter(plan, np.float32)
    np.testing.assert_array_equal(call(params, adapter, X, key=KEY), call(params, adapter, X))


def test_deterministic_in_the_key():
    call, params, adapter, _ = adapted(one, W, X)
    first, again, other = (branch(call, params, adapter, X, k) for k in (KEY, KEY, jax.random.key(12)))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    eager = call.__wrapped__
    np.testing.assert_array_equal(call(params, adapter, X, key=KEY), eager(params, adapter, X, key=KEY))


def test_raw_keys_work_too():
    call, params, adapter, _ = adapted(one, W, X)
    raw = jax.random.PRNGKey(11)
    np.testing.assert_array_equal(call(params, adapter, X, key=raw), call(params, adapter, X, key=KEY))


def chain(p, x):
    for name in ("a", "b"):
        x = jnp.tanh(x @ p[name])
    return x


def layered(n):
    """`n` uses of one weight, each adding its own branch to a row of the result."""
    return lambda p, x: jnp.stack([x @ p["w"] for _ in range(n)])


def test_independent_by_site_and_by_use():
    """Equal factors and data, and yet other masks: for each parameter, and for each use of one parameter."""
    params = {"a": normal(48, 48), "b": normal(48, 48)}

    def both(p, x):
        return jnp.stack([x @ p["a"], x @ p["b"]])

    call, params, adapter, plan = adapted(both, params, X)
    same = adapter.factors(plan.sites[0])
    leaves = {s.leaf_path(n): f for s in plan.sites for n, f in zip(("lora_A", "lora_B"), same, strict=True)}
    adapter = lj.Adapter.from_leaves(leaves, plan.sites)
    extra = np.asarray(call(params, adapter, X, key=KEY) - both(params, X))
    assert np.any(np.abs(extra[0] - extra[1]) > 0.1)

    call, params, adapter, _ = adapted(layered(3), W, X)
    y = np.asarray(call(params, adapter, X, key=KEY))
    assert np.any(np.abs(y[0] - y[1]) > 0.1) and np.any(np.abs(y[1] - y[2]) > 0.1)


def test_what_else_is_adapted_does_not_matter():
    """A site's mask follows from the key and its own name."""
    params = {"a": normal(48, 48), "b": normal(48, 48)}

    def both(p, x):
        return x @ p["a"], x @ p["b"]

    call, params, adapter, plan = adapted(both, params, X)
    alone = lj.plan(both, params, X, config=config(dropout=RATE, target_modules=["b"]))
    part = {
        s.leaf_path(n): f for s in alone.sites for n, f in zip(("lora_A", "lora_B"), adapter.factors(s), strict=True)
    }
    got = jax.jit(lj.apply(both, alone))(params, lj.Adapter.from_leaves(part, alone.sites), X, key=KEY)[1]
    np.testing.assert_array_equal(got, call(params, adapter, X, key=KEY)[1])


LOOPS = {
    "scan": lambda f, x: lax.scan(lambda c, _: (c, f(x)), 0, None, length=4)[1],
    "unrolled scan": lambda f, x: lax.scan(lambda c, _: (c, f(x)), 0, None, length=4, unroll=2)[1],
    "map": lambda f, x: lax.map(f, jnp.broadcast_to(x, (4, *x.shape))),
    "nested scans": lambda f, x: lax.scan(
        lambda c, _: (c, lax.scan(lambda c, _: (c, f(x)), 0, None, length=2)[1]), 0, None, length=2
    )[1].reshape(4, *x.shape[:-1], -1),
    "fori_loop": lambda f, x: lax.fori_loop(
        0, 4, lambda i, out: out.at[i].set(f(x)), jnp.zeros((4, x.shape[0], 32))
    ),
    "while": lambda f, x: lax.while_loop(
        lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1].at[c[0]].set(f(x))), (0, jnp.zeros((4, x.shape[0], 32)))
    )[1],
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_independent_by_step(name):
    """The same weight on the same data in each step, under other masks."""

    def fn(p, x):
        return LOOPS[name](lambda row: row @ p["w"], x)

    call, params, adapter, _ = adapted(fn, W, X)
    y = np.asarray(call(params, adapter, X, key=KEY))
    base = np.asarray(fn(params, jnp.asarray(X)))
    assert base.shape == (4, 64, 32) and np.all(base == base[0])
    masks = {y[i].tobytes() for i in range(4)}
    assert len(masks) == 4
    off = np.asarray(call(params, adapter, X))
    assert len({off[i].tobytes() for i in range(4)}) == 1


def test_scanned_layers_have_their_own_masks():
    params = {"w": np.stack([normal(48, 48)] * 3)}

    def fn(p, x):
        return lax.scan(lambda c, w: (c, c @ w), x, p["w"])[1]

    call, params, adapter, plan = adapted(fn, params, X)
    site = plan.sites[0]
    same = [jnp.broadcast_to(f[:1], f.shape) for f in adapter.factors(site)]
    adapter = lj.Adapter.from_leaves(
        dict(zip(map(site.leaf_path, ("lora_A", "lora_B")), same, strict=True)), plan.sites
    )
    y = np.asarray(call(params, adapter, X, key=KEY))
    assert len({y[i].tobytes() for i in range(3)}) == 3


REMATS = {
    "remat": lambda f: jax.checkpoint(f),
    "dots_saveable": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    "remat of jit": lambda f: jax.checkpoint(jax.jit(f)),
}


CHAIN = {"a": normal(48, 48) / 7, "b": normal(48, 48) / 7}


def chain_gradients(wrap, loop):
    """A function of the key: value and gradients of the chain, wrapped, once or three times in a scan."""
    layer = wrap(chain)

    def fn(p, x):
        if loop:
            return lax.scan(lambda x, _: (layer(p, x), None), x, None, length=3)[0].sum()
        return layer(p, x).sum()

    call, params, adapter, _ = adapted(fn, CHAIN, X)
    run = jax.jit(jax.value_and_grad(lambda p, a, key: call(p, a, X, key=key), argnums=(0, 1)))
    return lambda key: run(params, adapter, key)


@functools.cache
def without_remat(loop):
    run = chain_gradients(lambda f: f, loop)
    return run(KEY), run(jax.random.key(12))


@pytest.mark.parametrize(
    "name, loop", [("remat", False), ("remat", True), ("dots_saveable", True), ("remat of jit", True)]
)
def test_the_replay_of_remat_sees_the_same_mask(name, loop):
    """Gradients with and without remat are those of one function: the same masks, forward, again and backward."""
    want, other_masks = without_remat(loop)

    def worst(got):
        pairs = zip(jax.tree.leaves(got), (np.asarray(w, np.float64) for w in jax.tree.leaves(want)), strict=True)
        return max(reference.excess(g, w, reference.tolerance("float32", 128) * np.abs(w).max()) for g, w in pairs)

    assert worst(chain_gradients(REMATS[name], loop)(KEY)) <= 1 < worst(other_masks)


def test_finite_differences():
    """The gradient of the dropped branch is that of the function that was computed."""
    with jax.enable_x64(True):
        params, x = cast({"a": normal(12, 12), "b": normal(12, 12)}, np.float64), cast(normal(5, 12), np.float64)
        plan = lj.plan(chain, params, x, config=config(dropout=RATE, dtype="float64"))
        call, adapter = lj.apply(chain, plan), random_adapter(plan, np.float64)
        run = jax.jit(jax.value_and_grad(lambda adapter: call(params, adapter, x, key=KEY).sum()))
        _, gradient = run(adapter)
        step = jax.tree.map(lambda g: np.random.default_rng(0).standard_normal(g.shape), adapter)
        ahead, behind = (jax.tree.map(lambda a, d, h=h: np.asarray(a) + h * d, adapter, step) for h in (1e-6, -1e-6))
        numeric = (run(ahead)[0] - run(behind)[0]) / 2e-6
        exact = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), gradient, step)))
        assert abs(numeric - exact) < 1e-6 * abs(exact)


CONV = {"window_strides": (1,), "padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")}
KINDS = {
    "conv": (lambda p, x: lax.conv_general_dilated(x, p["w"], **CONV), (3, 6, 8), (4, 16, 6)),
    "experts": (lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]), (3, 6, 8), (3, 16, 6)),
    "grouped": (lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([5, 4, 7], jnp.int32)), (3, 6, 8), (16, 6)),
    "stack by index": (lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][jnp.arange(16) % 3]), (3, 6, 8), (16, 6)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_product_drops_its_input(name):
    """The mean over many keys is the branch without dropout; single draws are not."""
    fn, shape, x_shape = KINDS[name]
    call, params, adapter, _ = adapted(fn, {"w": normal(*shape)}, normal(*x_shape))
    x = jnp.asarray(normal(*x_shape))
    keys = jax.random.split(KEY, 1000)
    draws = np.asarray(lax.map(lambda k: call(params, adapter, x, key=k), keys), np.float64)
    off = np.asarray(call(params, adapter, x), np.float64)
    assert np.all(draws[0] != off)
    error = np.abs(draws.mean(0) - off) / (draws.std(0) / np.sqrt(len(keys)))
    assert np.max(error) < 5.5
    assert np.max(np.abs((1 - RATE) * draws.mean(0) - off) / (draws.std(0) / np.sqrt(len(keys)))) > 5.5


def test_the_op_and_the_helper():
    """`ops.dropout` is what `lora_dot` applies to its input."""
    x, w, a, b = (jnp.asarray(normal(*s)) for s in ((8, 6), (6, 5), (6, 2), (2, 5)))
    mask = np.asarray(dropout(jnp.ones_like(x), KEY, RATE))
    want, magnitude = reference.lora_dot(x, w, a, b, 0.5, mask)
    got = lora_dot(x, w, a, b, scale=0.5, dropout_rate=RATE, key=KEY)
    bound = reference.tolerance("float32", 8) * magnitude
    assert reference.excess(got, want, bound) <= 1 < reference.excess(lora_dot(x, w, a, b, scale=0.5), want, bound)
    assert dropout(x, None, RATE) is x and dropout(x, KEY, 0.0) is x
    half = dropout(x.astype(jnp.bfloat16), KEY, 0.5)
    assert half.dtype == jnp.bfloat16 and set(np.unique(half / x.astype(jnp.bfloat16)).tolist()) == {0.0, 2.0}


def test_nothing_of_the_size_of_the_mask_is_kept():
    """The backward pass draws the mask again from its key."""
    x, w, a, b = (jnp.asarray(normal(*s)) for s in ((8, 6), (6, 5), (6, 2), (2, 5)))
    _, vjp = jax.vjp(lambda *v: lora_dot(*v, dropout_rate=RATE, key=KEY), x, w, a, b)
    shapes = [leaf.shape for leaf in jax.tree.leaves(vjp) if leaf.ndim]
    assert shapes.count((8, 6)) == 1, shapes  # x itself
