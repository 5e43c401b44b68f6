"""The oracle and the tolerance policy, against definitions written out."""

from __future__ import annotations

import ast
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lora_jax import reference
from lora_jax.sites import Atom, Site


def site(shape, atoms, roles, **changes):
    return Site(
        ("w",),
        shape,
        "float32",
        "linear",
        tuple(Atom(*a) for a in atoms),
        roles,
        **{"rank": 2, "alpha": 3.0, **changes},
    )


def test_delta_by_loops():
    s = site((2, 4, 6), [(0, 1, 2), (1, 1, 4), (2, 3, 2), (2, 1, 3)], "lioi")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 3, 2)), rng.standard_normal((2, 2, 2))
    want = np.zeros((2, 4, 6))
    for layer in range(2):
        for d in range(4):
            for n in range(2):
                for h in range(3):
                    want[layer, d, 3 * n + h] = 1.5 * sum(a[layer, d, h, r] * b[layer, r, n] for r in range(2))
    np.testing.assert_allclose(reference.delta(s, a, b), want, rtol=1e-13)
    np.testing.assert_allclose(reference.merged(s, np.ones((2, 4, 6)), a, b), 1 + want, rtol=1e-13)


def test_factor_gradients_by_differences():
    s = site((4, 3), [(0, 1, 4), (1, 1, 3)], "oi", rslora=True)
    rng = np.random.default_rng(0)
    a, b, dw = rng.standard_normal((3, 2)), rng.standard_normal((2, 4)), rng.standard_normal((4, 3))
    da, db = reference.factor_gradients(s, a, b, dw)
    for got, values, of in ((da, a, lambda v: reference.delta(s, v, b)), (db, b, lambda v: reference.delta(s, a, v))):
        for index in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[index] = 1e-6
            numeric = ((of(values + step) - of(values - step)) * dw).sum() / 2e-6
            assert abs(numeric - got[index]) < 1e-8


def test_lora_dot_gradients_by_differences():
    rng = np.random.default_rng(0)
    shapes = dict(x=(3, 2, 4), w=(4, 5), a=(4, 2), b=(2, 5), bias=(5,))
    args = {n: rng.standard_normal(s) for n, s in shapes.items()}
    mask, dy = rng.integers(0, 2, (3, 2, 4)) * 1.25, rng.standard_normal((3, 2, 5))
    gradients = reference.lora_dot_gradients(*(args[n] for n in "xwab"), 0.7, dy, mask)
    for name, values in args.items():
        exact, size = gradients[name]
        assert exact.shape == size.shape == values.shape and np.all(size >= abs(exact) - 1e-12)
        for index in np.ndindex(values.shape):
            totals = []
            for h in (1e-6, -1e-6):
                moved = values.copy()
                moved[index] += h
                x, w, a, b, bias = {**args, name: moved}.values()
                y, _ = reference.lora_dot(x, w, a, b, 0.7, mask, bias)
                totals.append((y * dy).sum())
            assert abs((totals[0] - totals[1]) / 2e-6 - exact[index]) < 1e-7


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tolerance_holds_and_is_not_idle(dtype):
    """Rounding at every step stays within the bound and near it; a dropped adapter does not."""
    rng = np.random.default_rng(0)

    def product(x, y):
        """Summed in float32, rounded once."""
        return (x.astype(np.float32) @ y.astype(np.float32)).astype(dtype)

    worst = 0.0
    for _ in range(20):
        x, w, a, b = (rng.standard_normal(s).astype(dtype) for s in ((8, 64), (64, 8), (64, 4), (4, 8)))
        y = product(x, w) + product(product(x, a), (np.float32(0.7) * b.astype(np.float32)).astype(dtype))
        want, size = reference.lora_dot(x, w, a, b, 0.7)
        bound = reference.tolerance(dtype, 68) * size
        worst = max(worst, reference.excess(y, want, bound))
        assert reference.excess(product(x, w), want, bound) > 1
    # A bound for the worst case is met with room to spare by random errors: sqrt(68) of 68 terms in float32.
    assert (0.005 if dtype == np.float32 else 0.04) < worst <= 1


def test_unit_roundoff():
    assert reference.unit_roundoff("float32") == 2**-24
    assert reference.unit_roundoff("bfloat16") == 2**-8
    assert reference.unit_roundoff(np.float16) == 2**-11
    assert reference.unit_roundoff(np.float64) == 2**-53


def test_excess():
    want = np.array([1.0, 0.0, -2.0])
    assert reference.excess([1.5, 0.0, -2.0], want, 0.5) == 1
    assert reference.excess([1.0, 0.0, -2.0], want, 0.0) == 0
    assert reference.excess([1.0, 1e-300, -2.0], want, 0.0) == np.inf
    assert reference.excess([np.nan, 0.0, -2.0], want, 1.0) == np.inf
    assert reference.excess([1.0, 0.0], want, 1.0) == np.inf
    assert reference.excess(np.zeros((0, 3)), np.zeros((0, 3)), 1.0) == 0
    assert reference.excess(np.array(want, ml_dtypes.bfloat16), want, np.full(3, 1e-9)) == 0


def test_the_oracle_imports_no_jax_of_its_own():
    """It must not share code with what it checks, nor get its numbers from the same place."""
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "typing", "string", "numpy", "ml_dtypes", "lora_jax.sites"}
