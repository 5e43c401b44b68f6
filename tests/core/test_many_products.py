"""Products with one adapter of several, mapped over rows, against each row in float64 numpy."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import reference
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.many import Many, many_contract
from tests.core.harness import normal

ROWS, TOKENS, K, N, R, SLOTS = 5, 3, 6, 4, 2, 4
SPEC = Contraction(x=("t", "k"), w=("k", "n"), first=("k", "r"), second=("r", "n"), y=("t", "n"))
X, DY, W = normal(ROWS, TOKENS, K), normal(ROWS, TOKENS, N, seed=1), normal(K, N)
# The slots in the middle of one stack and at the end of the other: wherever a scan leaves them.
A, B, SCALE = normal(K, SLOTS, R), normal(R, N, SLOTS), np.array([0.5, -2.0, 0.0, 1.5], np.float32)


@functools.cache
def compiled(selection):
    many = Many(("k", "slot", "r"), ("r", "n", "slot"), SLOTS, selection)

    def run(x, w, a, b, scale, ids):
        return jax.vmap(lambda x, i: many_contract(SPEC, many, x, w, a, b, scale, i, None))(x, ids)

    def both(x, w, a, b, ids):
        y, back = jax.vjp(lambda x, w, a, b: run(x, w, a, b, SCALE, ids), x, w, a, b)
        return y, *back(DY)

    return jax.jit(both)


def rows_alone(ids):
    """y, the gradients of x, w, A and B, and a bound for each, row by row."""
    totals = [np.zeros(shape) for shape in (X.shape[:2] + (N,), X.shape, W.shape, A.shape, B.shape)]
    sizes = [np.zeros(t.shape) for t in totals]
    for row, i in enumerate(ids):
        a, b, s = A[:, i], B[:, :, i], float(SCALE[i]) if i >= 0 else 0.0
        y, size = reference.lora_dot(X[row], W, a, b, s)
        grads = reference.lora_dot_gradients(X[row], W, a, b, s, DY[row])
        totals[0][row], sizes[0][row] = y, size
        totals[1][row], sizes[1][row] = grads["x"]
        for place, name in ((2, "w"), (3, "a"), (4, "b")):
            at = (slice(None),) if name == "w" else (slice(None), i) if name == "a" else (slice(None), slice(None), i)
            for whole, value in zip((totals, sizes), grads[name], strict=True):
                whole[place][at] += value
    return totals, [reference.tolerance("float32", ROWS * TOKENS * (K + N + R)) * size for size in sizes]


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(-1, SLOTS - 1), min_size=ROWS, max_size=ROWS))
def test_rows_are_as_if_alone(ids):
    want, bounds = rows_alone(ids)
    for selection in ("gathered", "masked"):
        got = compiled(selection)(X, W, A, B, np.asarray(ids, np.int32))
        for y, w, bound in zip(got, want, bounds, strict=True):
            assert reference.excess(y, w, bound + 1e-30) <= 1


@pytest.mark.parametrize("selection", ["gathered", "masked"])
def test_the_bound_tells_another_adapter(selection):
    want, bounds = rows_alone([0, 1, 3, 1, -1])
    for wrong in ([1, 1, 3, 1, -1], [0, 1, 3, 1, 0], [-1, 1, 3, 1, -1]):
        got = compiled(selection)(X, W, A, B, np.asarray(wrong, np.int32))
        for place in (0, 1, 3, 4):
            assert reference.excess(got[place], want[place], bounds[place] + 1e-30) > 1


def test_which_way():
    """Decoding by one product over all slots, long rows by their own factors; a bank far larger than the batch too."""
    assert Many((), (), 32).way(rows=32, tokens=1) == "masked"
    assert Many((), (), 32).way(rows=32, tokens=256) == "gathered"
    assert Many((), (), 1000).way(rows=32, tokens=1) == "gathered"
    assert Many((), (), 32).way(rows=256, tokens=1) == "masked"
    assert Many((), (), 32, "gathered").way(rows=32, tokens=1) == "gathered"
