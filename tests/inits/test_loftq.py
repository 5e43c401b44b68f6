"""LoftQ and the quantisers under it, against NumPy with the published NF4 levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import inits, reference
from lora_jax.quant import dequantise, quantise, round_trip_int8
from tests.core.harness import normal
from tests.inits import zoo

# Dettmers et al., arXiv:2305.14314, appendix E.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(w: np.ndarray, block: int) -> np.ndarray:
    """Block by block, level by level; a float32 tie may go either way, so levels come from the library's table."""
    flat, out = w.reshape(-1), np.zeros(w.size)
    for start in range(0, w.size, block):
        part = flat[start : start + block]
        most = np.abs(part).max()
        nearest = np.abs(part[:, None] / most - NF4).argmin(1)
        out[start : start + block] = NF4[nearest] * most
    return out.reshape(w.shape)


@pytest.mark.parametrize("block", [64, 50])
def test_normal_float(block):
    w = normal(7, 37, seed=3)
    want = nf4(w.astype(np.float64), block)
    got = dequantise(quantise(jnp.asarray(w), block=block), w.shape)
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(w).max())
    assert np.abs(want - w).max() > 0.05  # four bits lose something
    again = dequantise(quantise(got, block=block), w.shape)
    np.testing.assert_allclose(again, got, atol=1e-6)
    finer = dequantise(quantise(jnp.asarray(w), bits=7, block=block), w.shape, bits=7)
    assert np.linalg.norm(finer - w) < np.linalg.norm(want - w) / 5
    assert not np.asarray(dequantise(quantise(jnp.zeros(5)), (5,))).any()


def test_int8():
    w = normal(5, 30, seed=4) * 10.0 ** np.arange(5)[:, None]
    got = round_trip_int8(jnp.asarray(w, np.float32))
    step = np.abs(w).max(1, keepdims=True) / 127
    assert reference.excess(got, w, 0.501 * step) <= 1 < reference.excess(got, w, 0.4 * step)


def alternately(w: np.ndarray, rank: int, iterations: int, is_table: bool) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of the paper on one matrix (in, out): the base and the low-rank part."""
    part = np.zeros_like(w)
    for _ in range(iterations):
        base = nf4(w - part, 64) if is_table else nf4(np.ascontiguousarray((w - part).T), 64).T
        u, s, vh = np.linalg.svd(w - base)
        part = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return base, part


def test_loftq():
    iterations = 3
    names = ["table", "heads", "stack"]
    with jax.enable_x64(True):
        params = {name: jnp.asarray(w, np.float64) for name, w in zoo.params().items()}
        plan = zoo.plan(params, names, alpha=5.0)
        adapter, new_params = inits.loftq(plan, params, iterations=iterations)
        for site in adapter.sites:
            change = reference.delta(site, *adapter.factors(site))
            trees = (params[site.name], new_params[site.name], change)
            for w, base, part in zip(*(zoo.matrices(site.name, x) for x in trees), strict=True):
                want_base, want_part = alternately(w, site.rank, iterations, site.name == "table")
                # The published levels have seven digits.
                np.testing.assert_allclose(base, want_base, atol=1e-6)
                np.testing.assert_allclose(part, want_part, atol=1e-5)
                # The factors make up for a part of what the base lost; with another scale they would not.
                assert np.linalg.norm(w - base - part) < 0.8 * np.linalg.norm(w - base)
                assert np.linalg.norm(w - base - 2 * part) > 1.1 * np.linalg.norm(w - base - part)
        assert new_params["head"] is params["head"]


def test_other_quantisers():
    params = zoo.params()
    plan = zoo.plan(params, ["head"], dtype="float32")
    _, eight = inits.loftq(plan, params, bits=8)
    np.testing.assert_array_equal(eight["head"], round_trip_int8(jnp.asarray(params["head"])))
    adapter, rounded = inits.loftq(plan, params, round_trip=jnp.round)
    np.testing.assert_array_equal(rounded["head"], np.round(params["head"]))
    back = rounded["head"] + reference.delta(plan.sites[0], *adapter.factors(plan.sites[0]))
    assert np.linalg.norm(back - params["head"]) < 0.8 * np.linalg.norm(rounded["head"] - params["head"])


def test_refusals():
    params = zoo.params()
    plan = zoo.plan(params, ["head"], dtype="float32")
    with pytest.raises(ValueError, match="`bits=9`"):
        inits.loftq(plan, params, bits=9)
    with pytest.raises(ValueError, match="`block=0`"):
        inits.loftq(plan, params, block=0)
    with pytest.raises(ValueError, match="`iterations=0`"):
        inits.loftq(plan, params, iterations=0)
