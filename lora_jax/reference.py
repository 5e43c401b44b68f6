"""The oracle: low-rank algebra in float64 numpy, and the only place that states a tolerance.

Nothing here uses jax or any other part of the library but the description of a site, so an error in the library
is not repeated here. Tolerances are bounds, not habits: they follow from how often a result is rounded and how
many terms are summed, and every test that uses one also shows that a dropped or unscaled adapter exceeds it.
"""

from __future__ import annotations

import string
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.sites import Atom, Site

# Two factorings of one product, `||B1 A1 - B2 A2||_F` over the larger norm in float64. Rounding leaves some hundred
# unit roundoffs of 1.1e-16. The smallest real difference, one of a million float32 factors in its last bit, moves the
# product by 6e-8 / 1e3.
SAME_PRODUCT = 1e-12

# Roundings to the compute dtype on the way to one adapted output: both factors' casts, x·A, x·A·B, x·W, the sum.
ROUNDINGS = 6


def tolerance(dtype: Any, terms: int) -> float:
    """Bound on |error| / magnitude of `x·W + s·(x·A)·B`, where the magnitude is the same sum over |inputs|.

    `ROUNDINGS` results are rounded to `dtype`, and sums of `terms` products accumulate in float32 (float64 for
    float64), each of them with a relative error of at most one unit roundoff.

    **Source:** Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, lemma 3.1 and section 3.1,
    to first order.
    """
    accumulator = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    return ROUNDINGS * unit_roundoff(dtype) + terms * unit_roundoff(accumulator)


def unit_roundoff(dtype: Any) -> float:
    """Largest relative error of one rounding to nearest: 2**-24 for float32, 2**-8 for bfloat16."""
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2


def excess(got: Any, want: np.ndarray, bound: Any) -> float:
    """The worst of |got - want| / bound: at most 1 if `got` is right. Infinite for NaN or another shape."""
    got = np.asarray(got).astype(np.float64)
    if got.shape != np.shape(want):
        return float("inf")
    if got.size == 0:
        return 0.0
    error = np.abs(got - want)
    with np.errstate(all="ignore"):
        ratio = np.where(error == 0, 0.0, error / np.broadcast_to(bound, error.shape))
    return float(np.max(np.where(np.isnan(ratio), np.inf, ratio)))


def lora_dot(
    x: np.ndarray,
    w: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    scale: float,
    mask: np.ndarray | None = None,
    bias: Any = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """`x·W + scale·(mask*x)·A·B + bias` and its magnitude. `mask` is 0 or 1 / (1 - rate) per element of `x`."""
    x, w, a, b, bias = (np.asarray(v).astype(np.float64) for v in (x, w, a, b, bias))
    dropped = x if mask is None else x * np.asarray(mask, np.float64)
    want = x @ w + scale * (dropped @ a) @ b + bias
    return want, abs(x) @ abs(w) + abs(scale) * (abs(dropped) @ abs(a)) @ abs(b) + abs(bias)


def lora_dot_gradients(
    x: np.ndarray,
    w: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    scale: float,
    dy: np.ndarray,
    mask: np.ndarray | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{"x" | "w" | "a" | "b" | "bias": (gradient, magnitude)}` of `sum(dy * lora_dot(...))`."""
    x, w, a, b, dy = (np.asarray(v).astype(np.float64) for v in (x, w, a, b, dy))
    keep = np.ones_like(x) if mask is None else np.asarray(mask, np.float64)

    def gradients(x, w, a, b, scale, dy):
        rows, grad = (x * keep).reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return {
            "x": dy @ w.T + scale * ((dy @ b.T) @ a.T) * keep,
            "w": x.reshape(rows.shape).T @ grad,
            "a": scale * rows.T @ (grad @ b.T),
            "b": scale * (rows @ a).T @ grad,
            "bias": grad.sum(0),
        }

    exact = gradients(x, w, a, b, scale, dy)
    magnitude = gradients(abs(x), abs(w), abs(a), abs(b), abs(scale), abs(dy))
    return {name: (exact[name], magnitude[name]) for name in exact}


def fused(
    x: np.ndarray,
    w: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    dy: np.ndarray,
    dtype: Any,
    scale: float = 1.0,
    mask: np.ndarray | None = None,
    bias: Any = 0.0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{"y" | "x" | "a" | "b": (value, bound on |error|)}` of `lora_dot` and its gradients by fused kernels.

    These round to `dtype` only `h = scale·(mask*x)·A`, `g = scale·dy·Bᵀ`, `y` and the gradient of `x`, each once, and
    sum in float32. So the bound takes the exact `|h|`, `|g|` and results where `tolerance` takes sums of magnitudes:
    it stays below a small part of the adapter's effect at any size.

    **Source:** as for `tolerance`.
    """
    want, magnitude = lora_dot(x, w, a, b, scale, mask, bias)
    gradients = lora_dot_gradients(x, w, a, b, scale, dy, mask)
    x, a, b, dy = (np.asarray(v).astype(np.float64) for v in (x, a, b, dy))
    keep = np.ones_like(x) if mask is None else mask
    h, g = abs(scale * (x * keep) @ a), abs(scale * dy @ b.T)
    once, summed = unit_roundoff(dtype), (x.shape[0] + sum(w.shape) + a.shape[1]) * unit_roundoff(np.float32)
    rounded = {
        "y": abs(want) + h @ abs(b),
        "x": abs(gradients["x"][0]) + keep * (g @ abs(a).T),
        "a": abs(x * keep).T @ g,
        "b": h.T @ abs(dy),
    }
    exact = {"y": (want, magnitude), **{name: gradients[name] for name in "xab"}}
    return {name: (exact[name][0], once * error + summed * exact[name][1]) for name, error in rounded.items()}


def delta(site: Site, a: Any, b: Any) -> np.ndarray:
    """`scale * sum_r A[l, i, r] * B[l, r, o]` in the shape of the site's parameter."""
    letter = _letters(site)
    spec = f"{_axes(site, 'li', letter)}r,{_axes(site, 'l', letter)}r{_axes(site, 'o', letter)}->"
    spec += "".join(letter[atom] for atom in site.atoms)
    product = np.einsum(spec, np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64))
    return site.scale * product.reshape(site.shape)


def merged(site: Site, w: Any, a: Any, b: Any, magnitude: Any = None) -> np.ndarray:
    """`W + s·A·B` in float64; with a magnitude of shape (*lead, *out), DoRA's multiple of it."""
    dense = np.asarray(w).astype(np.float64) + delta(site, a, b)
    return dense if magnitude is None else dense * dora_scale(site, w, a, b, magnitude)


def column_norms(site: Site, w: Any, a: Any, b: Any) -> np.ndarray:
    """`|W + s·A·B|` over the in axes, (*lead, *out), from the formed sum."""
    letter = _letters(site)
    dense = (np.asarray(w).astype(np.float64) + delta(site, a, b)).reshape([atom.size for atom in site.atoms])
    whole = "".join(letter[atom] for atom in site.atoms)
    return np.sqrt(np.einsum(f"{whole},{whole}->{_axes(site, 'lo', letter)}", dense, dense))


def dora_scale(site: Site, w: Any, a: Any, b: Any, magnitude: Any) -> np.ndarray:
    """`magnitude / |W + s·A·B|`, repeated along the in axes, in the shape of the site's parameter."""
    letter = _letters(site)
    c = np.asarray(magnitude).astype(np.float64) / column_norms(site, w, a, b)
    ones = np.ones([atom.size for atom in site.atoms])
    whole = "".join(letter[atom] for atom in site.atoms)
    return np.einsum(f"{_axes(site, 'lo', letter)},{whole}->{whole}", c, ones).reshape(site.shape)


def magnitude_gradient(site: Site, w: Any, a: Any, b: Any, dw: Any) -> np.ndarray:
    """DoRA's gradient of the magnitude, (*lead, *out), from the gradient `dw` of the merged weight."""
    letter = _letters(site)
    sizes = [atom.size for atom in site.atoms]
    whole = "".join(letter[atom] for atom in site.atoms)
    dense = merged(site, w, a, b).reshape(sizes)
    grad = np.asarray(dw).astype(np.float64).reshape(sizes)
    return np.einsum(f"{whole},{whole}->{_axes(site, 'lo', letter)}", grad, dense) / column_norms(site, w, a, b)


def factor_gradients(site: Site, a: Any, b: Any, dw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of A and B by the chain rule, from the gradient `dw` of the merged weight.

    With DoRA, whose norm is detached, `dw` times `dora_scale` is what stands for it.
    """
    letter = _letters(site)
    whole = "".join(letter[atom] for atom in site.atoms)
    a_axes = _axes(site, "li", letter) + "r"
    b_axes = _axes(site, "l", letter) + "r" + _axes(site, "o", letter)
    grad = np.asarray(dw).astype(np.float64).reshape([atom.size for atom in site.atoms])
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    da = site.scale * np.einsum(f"{whole},{b_axes}->{a_axes}", grad, b)
    db = site.scale * np.einsum(f"{a_axes},{whole}->{b_axes}", a, grad)
    return da, db


def _letters(site: Site) -> dict[Atom, str]:
    """One einsum letter per atom; `r` is the rank's."""
    return dict(zip(site.atoms, (c for c in string.ascii_letters if c != "r"), strict=False))


def _axes(site: Site, roles: str, letter: dict[Atom, str]) -> str:
    return "".join(letter[atom] for role in roles for atom in site.atoms_of(role))
