"""Low-rank products as matrices: their singular values from thin factors, and a randomised SVD for what is none.

Letters: L stacked matrices (all lead axes as one), m input features, n output features, r rank. `left` is (L, m, r),
`right` is (L, r, n), and their product the change of a weight without its scale.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.sites import Site

HIGHEST = lax.Precision.HIGHEST


def as_matrices(site: Site, a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """`(left, right)` of a site's factors, in float32 (float64 for float64 factors).

    Of QALoRA's own A, which has a row for each group of inputs, the left ones are (L, m / group, r).
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    stacked = math.prod(site.sizes_of("l"))
    return (
        a.astype(wide).reshape(stacked, -1, site.rank),
        b.astype(wide).reshape(stacked, site.rank, site.fan_out),
    )


def as_factors(site: Site, left: jax.Array, right: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """`(lora_A, lora_B)` of a site, whose rank is that of the matrices."""
    return left.reshape(site.a_shape).astype(dtype), right.reshape(site.b_shape).astype(dtype)


def times(left: jax.Array, right: jax.Array) -> jax.Array:
    """The product of stacked matrices."""
    return jnp.matmul(left, right, precision=HIGHEST)


def product_svd(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(u, s, vt)` of `left @ right`, from the QR of each factor: O((m + n) r²), and the product is never formed.

    **Returns:** (L, m, k), (L, k) descending and (L, k, n), with k = min(m, n, r).
    """
    q_left, r_left = jnp.linalg.qr(left)
    q_right, r_right = jnp.linalg.qr(jnp.swapaxes(right, -1, -2))
    u, s, vt = jnp.linalg.svd(times(r_left, jnp.swapaxes(r_right, -1, -2)), full_matrices=False)
    return times(q_left, u), s, times(vt, jnp.swapaxes(q_right, -1, -2))


def randomised_svd(
    matrix: jax.Array, rank: int, key: jax.Array, iterations: int, oversample: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading `rank` singular triplets of each (m, n) matrix of a stack, up to a small error.

    With `q` an orthonormal basis of what `iterations` power steps made of `rank + oversample` random directions, the
    SVD of `qᵀ·matrix`. The error of the product is that of the exact truncation times a factor that falls to 1 with
    each iteration.

    **Source:** Halko, Martinsson & Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    m, n = matrix.shape[-2:]
    width = min(rank + oversample, m, n)
    transposed = jnp.swapaxes(matrix, -1, -2)
    basis = jnp.linalg.qr(times(matrix, jax.random.normal(key, (*matrix.shape[:-2], n, width), matrix.dtype)))[0]

    def step(_: int, basis: jax.Array) -> jax.Array:
        # Made orthonormal at every step: else all columns lean towards the first singular vector.
        return jnp.linalg.qr(times(matrix, jnp.linalg.qr(times(transposed, basis))[0]))[0]

    basis = lax.fori_loop(0, iterations, step, basis)  # a loop, since each decomposition takes long to compile
    u, s, vt = jnp.linalg.svd(times(jnp.swapaxes(basis, -1, -2), matrix), full_matrices=False)
    return times(basis, u), s, vt


def first(rank: int, u: jax.Array, s: jax.Array, vt: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`rank` triplets of an SVD; those that it lacks are zero."""
    missing = max(0, rank - s.shape[-1])
    pad = [(0, 0)] * (s.ndim - 1)
    return (
        jnp.pad(u[..., :rank], [*pad, (0, 0), (0, missing)]),
        jnp.pad(s[..., :rank], [*pad, (0, missing)]),
        jnp.pad(vt[..., :rank, :], [*pad, (0, missing), (0, 0)]),
    )
