"""The second module of the family `reference_kernels`: several products that share `x`, in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from tests.kernels.reference_kernels import Wants, calls, mask, product


def unsupported(m, k, ns, ranks, dtype):
    return f"ranks {ranks} are more than 64 together" if sum(h_layout(ranks)[1]) > 64 else None


def h_layout(ranks):
    return max(ranks) <= 16, [-(-rank // 16) * 16 for rank in ranks]


def forward(x, ws, a_s, b_s, drop=None, *, biases):
    calls.append(("forward", (*x.shape, *(w.shape[1] for w in ws))))
    assert [w.shape for w in ws] == [(x.shape[1], b.shape[1]) for b in b_s]
    rank_first, thins = h_layout([b.shape[0] for b in b_s])
    kept = x if drop is None else x * mask(x.shape, drop)
    ys, hs = [], []
    for w, a, b, bias, thin in zip(ws, a_s, b_s, biases, thins, strict=True):
        h = product(kept, a).astype(x.dtype)
        y = product(x, w) + product(h, b) + (0 if bias is None else bias.astype(jnp.float32))
        ys.append(y.astype(x.dtype))
        hs.append(jnp.pad(h, ((0, 0), (0, thin - h.shape[1]))))
    rows = -(-len(x) // 64) * 64
    h = jnp.pad(jnp.concatenate(hs, 1), ((0, rows - len(x)), (0, 0)), constant_values=np.nan)
    return ys, h.T if rank_first else h


def backward(dys, x, ws, a_s, b_s, h, drop=None, *, wants=Wants()):  # noqa: B008
    calls.append(("backward", (*x.shape, *(w.shape[1] for w in ws))))
    rank_first, thins = h_layout([b.shape[0] for b in b_s])
    keep = 1 if drop is None else mask(x.shape, drop)
    starts = np.cumsum([0, *thins])
    hs = [(h.T if rank_first else h)[: len(x), i : i + b.shape[0]] for i, b in zip(starts, b_s, strict=False)]
    gs = [product(dy, b.T).astype(x.dtype) for dy, b in zip(dys, b_s, strict=True)]
    each = zip(dys, ws, gs, a_s, strict=True)
    dx = sum(product(dy, w.T) + keep * product(g, a.T) for dy, w, g, a in each).astype(x.dtype)
    das = [product((x * keep).T, g) for g in gs]
    dbs = [product(h.T, dy) for h, dy in zip(hs, dys, strict=True)]
    return dx if wants.x else None, das if wants.a else None, dbs if wants.b else None
