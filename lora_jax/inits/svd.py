"""Leading singular triplets of stacks of matrices, exact or by random projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

SVD = tuple[jax.Array, jax.Array, jax.Array]


def leading(m: jax.Array, rank: int) -> SVD:
    """`(U, S, Vh)` of the `rank` largest singular values of `m` (..., i, o), which has at least so many."""
    u, s, vh = jnp.linalg.svd(m, full_matrices=False)
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def randomised(key: jax.Array, m: jax.Array, rank: int, columns: int, iterations: int) -> SVD:
    """`leading`, from the range of `m` applied to `columns` random vectors; exact if they are as many as `m` has.

    Each of `iterations` multiplies the error by the square of the ratio of the singular values just below and just
    above the cut.

    **Source:** Halko, Martinsson, Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    columns = min(columns, *m.shape[-2:])
    q = m @ jax.random.normal(key, (m.shape[-1], columns), m.dtype)
    q = jnp.linalg.qr(q)[0]

    def sharper(_: int, q: jax.Array) -> jax.Array:
        back = jnp.linalg.qr(jnp.swapaxes(m, -1, -2) @ q)[0]
        return jnp.linalg.qr(m @ back)[0]

    q = lax.fori_loop(0, iterations, sharper, q)
    u, s, vh = jnp.linalg.svd(jnp.swapaxes(q, -1, -2) @ m, full_matrices=False)
    u = q @ u
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]
