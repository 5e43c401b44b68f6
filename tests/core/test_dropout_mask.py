"""The mask itself: against the same bits in numpy, wherever it is drawn, and as random as it should be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax import reference
from lora_jax.ops import dropout, lora_dot
from lora_jax.ops.dropout import drop, keeps, seed_words
from tests.core.harness import config, normal
from tests.kernels.problems import drawn

KEY = jax.random.key(5)
RATE = 0.3


def kept(key, n_rows, n_columns, rate):
    """The mask of an (n_rows, n_columns) matrix, in numpy."""
    seed = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    return drawn((n_rows, n_columns), (int(seed[0]), int(seed[1]))) >= round(rate * 65536)


def mask(x, key=KEY, rate=RATE, columns=(-1,)):
    run = jax.jit(lambda x, key: drop(x, key, rate, columns))
    return np.asarray(run(np.ones(x.shape, np.float32), key)) != 0


@pytest.mark.parametrize(
    "shape, columns", [((40, 300), (-1,)), ((5, 8, 300), (-1,)), ((5, 8, 300), (1, 2)), ((5, 8, 300), (0,)),
                       ((6, 3, 40, 5), (2, 1)), ((300,), (0,)), ((3, 300), ())],
)  # fmt: skip
def test_the_same_bits_as_in_numpy(shape, columns):
    """Rows are the other axes and columns the contracted ones, each in the array's own order."""
    inner = sorted(axis % len(shape) for axis in columns)
    outer = [axis for axis in range(len(shape)) if axis not in inner]
    got = mask(np.zeros(shape), columns=columns).transpose(*outer, *inner)
    n_columns = int(np.prod([shape[axis] for axis in inner]))
    want = kept(KEY, got.size // n_columns, n_columns, RATE)
    np.testing.assert_array_equal(got.reshape(want.shape), want)
    assert not np.array_equal(kept(jax.random.key(6), *want.shape, RATE), want)


def test_products_drop_these_elements():
    """`lora_dot`, and a model whose product contracts two axes, out of order."""
    x, w, a, b = normal(2, 9, 160), normal(160, 7), normal(160, 4), normal(4, 7)
    factor = 65536 / (65536 - round(RATE * 65536))
    keep = kept(KEY, 18, 160, RATE).reshape(x.shape) * factor
    got = lora_dot(*map(jnp.asarray, (x, w, a, b)), scale=0.7, dropout_rate=RATE, key=KEY)
    want, magnitude = reference.lora_dot(x, w, a, b, 0.7, keep)
    bound = reference.tolerance("float32", 164) * magnitude
    assert reference.excess(got, want, bound) <= 1
    for other in (keep / factor, np.roll(keep, 1, 0), np.roll(keep, 1, 2), None):
        assert reference.excess(reference.lora_dot(x, w, a, b, 0.7, other)[0], want, bound) > 1

    def fn(p, x):
        return jnp.einsum("bhtd,dhf->btf", x, p["w"])

    params, x = {"w": np.zeros((8, 20, 7), np.float32)}, normal(3, 20, 6, 8)
    plan = lj.plan(fn, params, x, config=config(dropout=RATE))
    adapter, site = plan.init(jax.random.key(0)), plan.sites[0]
    key = jax.random.fold_in(jax.random.fold_in(KEY, site.seed), 0)
    a, b = (np.asarray(factor, np.float64) for factor in adapter.factors(site))
    keep = kept(key, 18, 160, RATE).reshape(3, 6, 20, 8).transpose(0, 2, 1, 3) * factor

    def exact(keep):
        h = np.einsum("bhtd,dhr->btr", x * keep, a)
        return site.scale * np.einsum("btr,rf->btf", h, b)

    bound = reference.tolerance("float32", 164) * site.scale * np.einsum(
        "btr,rf->btf", np.einsum("bhtd,dhr->btr", abs(x * keep), abs(a)), abs(b)
    )  # fmt: skip
    got = lj.apply(fn, plan)(params, adapter, x, key=KEY)
    assert reference.excess(got, exact(keep), bound) <= 1 < reference.excess(got, exact(np.roll(keep, 1, 3)), bound)


def test_the_same_in_every_transformation():
    x = jnp.asarray(normal(6, 4, 256))
    want = np.asarray(dropout(x, KEY, RATE))

    def f(x, key=KEY):
        return dropout(x, key, RATE)

    jitted = jax.jit(f)
    np.testing.assert_array_equal(jitted(x), want)
    np.testing.assert_array_equal(jax.checkpoint(f)(x), want)
    np.testing.assert_array_equal(lax.scan(lambda c, _: (c, f(c)), x, None, length=2)[1], np.stack([want, want]))
    transpose = jax.jit(lambda x: jax.vjp(f, x)[1](x)[0])
    np.testing.assert_array_equal(transpose(x), want)  # linear, and its own transpose
    # Mapped over: rows count within one element of the map; a key for each gives a mask for each.
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(np.stack([x, x])), np.stack([want, want]))
    keys = jax.random.split(KEY, 3)
    each = jax.jit(jax.vmap(f, in_axes=(None, 0)))(x, keys)
    np.testing.assert_array_equal(each, np.stack([jitted(x, key) for key in keys]))
    assert np.any(each[0] != each[1])


def test_a_block_of_a_larger_array():
    """What a device that holds one part draws is that part of the whole mask."""
    whole = (6, 5, 300)
    for columns in ((-1,), (1, 2), (0, 2)):
        every = np.asarray(keeps(seed_words(KEY), whole, columns, 20000))
        part = keeps(seed_words(KEY), (2, 5, 100), columns, 20000, whole=whole, origin=(4, 0, 200))
        np.testing.assert_array_equal(part, every[4:6, :, 200:])
        assert np.any(every[:2, :, :100] != every[4:6, :, 200:])


# The bits are those of numpy on every stack (above), so one stack counts them.
@pytest.mark.pinned
@pytest.mark.parametrize("rate", [2**-16, 0.01, 0.1, 0.5, 0.9])
def test_rate(rate):
    """Counts of a binomial distribution, within five standard deviations: over all, and over each row and column."""
    n = 1024
    dropped = ~mask(np.zeros((n, n)), rate=rate)
    p = round(rate * 65536) / 65536

    def deviations(count, draws):
        return np.abs(count - p * draws) / np.sqrt(p * (1 - p) * draws)

    assert deviations(dropped.sum(), n * n) < 5
    if p * n > 50:
        assert deviations(dropped.sum(0), n).max() < 5.5 and deviations(dropped.sum(1), n).max() < 5.5
        assert deviations(dropped.sum() * 1.05, n * n) > 5


@pytest.mark.pinned
def test_neither_rows_nor_columns_nor_keys_are_correlated():
    """Correlations of independent draws: normal, of standard deviation 1/sqrt(draws)."""
    n = 2048
    m = mask(np.zeros((n, n)), rate=0.5).astype(np.float64) - 0.5

    def correlation(p, q):
        return abs((p * q).mean()) / 0.25 * np.sqrt(p.size)

    # 64 columns apart, two elements share one mixed word.
    for shift in (1, 2, 3, 64, 65, 128, 1024):
        assert correlation(m[shift:], m[:-shift]) < 5 and correlation(m[:, shift:], m[:, :-shift]) < 5
        assert correlation(m[shift:, shift:], m[:-shift, :-shift]) < 5
    for other in (jax.random.key(6), jax.random.fold_in(KEY, 1), jax.random.fold_in(KEY, 2)):
        o = mask(np.zeros((n, n)), other, 0.5) - 0.5
        assert correlation(m, o) < 5
        assert max(correlation(m[shift:], o[:-shift]) for shift in (1, 2, 64)) < 5
    # All pairs of rows and of columns at once: no pair far out.
    for side in (m, m.T):
        pairs = np.abs(side @ side.T / (0.25 * n) * np.sqrt(n))[np.triu_indices(n, 1)]
        assert pairs.max() < 6.5 and abs((pairs**2).mean() - 1) < 0.01
    assert correlation(m, m) > 5


@pytest.mark.parametrize("rate, steps", [(1e-6, 0), (1 - 1e-6, 65536)])
def test_rates_that_round_to_nothing_or_all_are_refused(rate, steps):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=rf"{rate} rounds to {steps}/65536"):
        dropout(x, KEY, rate)
    with pytest.raises(ValueError, match=rf"{rate} rounds to {steps}/65536"):
        lora_dot(x, jnp.ones((3, 4)), jnp.ones((3, 1)), jnp.ones((1, 4)), dropout_rate=rate)
    params = {"w": jnp.ones((3, 4))}
    plan = lj.plan(lambda p, x: x @ p["w"], params, x, config=config(dropout=rate))
    with pytest.raises(ValueError, match=rf"{rate} rounds to {steps}/65536"):
        lj.apply(lambda p, x: x @ p["w"], plan)
    assert dropout(x, None, rate) is x


def test_half_precision_is_rounded_once():
    """The division is done in float32, also where what is kept has no exact inverse in bfloat16."""
    x = jnp.asarray(normal(64, 64)).astype(jnp.bfloat16)
    got, exact = dropout(x, KEY, RATE), np.asarray(x, np.float64) * 65536 / (65536 - round(RATE * 65536))
    keep = np.asarray(got) != 0
    assert reference.excess(got, np.where(keep, exact, 0), 2**-8 * np.abs(exact)) <= 1
