"""The third module of the family `reference_kernels`: an adapter of each run of rows, in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from tests.kernels.reference_kernels import Wants as Wants
from tests.kernels.reference_kernels import calls, h_layout


def product(x, y):
    return jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32), precision="highest")


def unsupported(m, k, n, rank, runs, dtype):
    return f"runs of {m // runs} rows are not whole" if m % runs or m // runs < 2 else None


def forward(x, w, a_s, b_s, *, transposed=False):
    calls.append(("forward", (*x.shape, *b_s.shape)))
    runs, _, r = a_s.shape
    assert w.shape == ((b_s.shape[2], x.shape[1]) if transposed else (x.shape[1], b_s.shape[2]))
    assert {x.dtype, w.dtype, a_s.dtype, b_s.dtype} == {x.dtype}
    h = product(x.reshape(runs, -1, x.shape[1]), a_s).astype(x.dtype)
    y = product(x, w.T if transposed else w) + product(h, b_s).reshape(len(x), -1)
    rank_first, thin = h_layout(r)
    h = jnp.pad(h.reshape(len(x), r), ((0, 0), (0, thin - r)))
    h = jnp.pad(h, ((0, -len(x) % 64), (0, 0)), constant_values=np.nan)
    return y.astype(x.dtype), h.T if rank_first else h


def backward(dy, x, w, a_s, b_s, h, *, transposed=False, wants=Wants()):  # noqa: B008
    calls.append(("backward", (*x.shape, *b_s.shape)))
    runs, _, r = a_s.shape
    h = (h.T if h_layout(r)[0] else h)[: len(x), :r].reshape(runs, -1, r)
    each, rows = dy.reshape(runs, -1, dy.shape[1]), x.reshape(runs, -1, x.shape[1])
    g = product(each, b_s.swapaxes(1, 2)).astype(x.dtype)
    dx = product(dy, w if transposed else w.T) + product(g, a_s.swapaxes(1, 2)).reshape(x.shape)
    da, db = product(rows.swapaxes(1, 2), g), product(h.swapaxes(1, 2), each)
    return dx.astype(x.dtype) if wants.x else None, da if wants.a else None, db if wants.b else None
