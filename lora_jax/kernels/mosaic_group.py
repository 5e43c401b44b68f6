"""Hopper: several `y = x·W + drop(x)·A·B (+ bias)` of one `x`, as of query, key and value, or of gate and up.

What each would do alone for all of them together: `h` of all is one pass over `x`, and so are all `dA`; the gradient of
`x` is one product as deep as all `W` are wide, with one tail, so that it is written once and never read to be added to.
`g` of all is one launch. What has to do with one `W` alone (its product forward, its `dB`) runs by the kernels of
`mosaic_lora`. Where these compute `h` in the product (`mosaic_adapted`), forward and without dropout, so it is here.

`h` of all lies in one array, the ranks of each padded as its product wants them; of `g`, which one product takes, only
the sum of the ranks is padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.kernels import mosaic_lora, tuned
from lora_jax.kernels.gemm_config import in_ring, padded_rank
from lora_jax.kernels.gemm_config import unsupported as gemm_unsupported
from lora_jax.kernels.linear import Drop, Wants
from lora_jax.kernels.mosaic_down import down
from lora_jax.kernels.mosaic_gemm import gemm
from lora_jax.kernels.mosaic_lora import multiprocessors, pad, padded_sizes
from lora_jax.kernels.mosaic_outer import outer

Arrays = Sequence[jax.Array]
MOST_RANKS = 256


def h_layout(ranks: Sequence[int]) -> tuple[bool, list[int]]:
    """Whether ranks come first in the `h` of `forward`, and how many each has there, padding included."""
    rank_first = max(ranks) <= 16
    return rank_first, [16 if rank_first else max(64, padded_rank(rank)) for rank in ranks]


def unsupported(m: int, k: int, ns: Sequence[int], ranks: Sequence[int], dtype: Any) -> str | None:
    """Why the kernels can't take together what they can compute one by one, or None."""
    _, thins = h_layout(ranks)
    if sum(thins) > MOST_RANKS:
        return f"ranks {', '.join(map(str, ranks))} are {sum(thins)} with their padding; together at most {MOST_RANKS}"
    (m, k, _), widths = padded_sizes(m, k, 0), [padded_sizes(0, 0, n)[2] for n in ns]
    products = [(k, n, thin, False) for n, thin in zip(widths, thins, strict=True)]
    products += [(sum(widths), k, padded_rank(sum(ranks)), masked) for masked in (False, True)]
    for contracted, out, rank, masked in products:
        config = tuned.gemm_config(m, contracted, out, rank, dropped=masked)
        if problem := gemm_unsupported(m, contracted, out, rank, config, masked=masked):
            return problem
    return None


def slower(m: int, k: int, ns: Sequence[int], ranks: Sequence[int], dropped: bool) -> str | None:
    """Why they are faster one by one, or None: where these move fewer bytes, since the products are the same.

    Alone, a product computes its thin one for nothing, and `x` and its gradient pass by once for each; together, a pass
    over each `dy` is added. With dropout, both draw the mask, the former again for each product.
    """
    count, wide = len(ns), sum(ns)
    if dropped or not all(mosaic_lora.in_one_kernel(each, padded_rank(rank)) for each in (k, *ns) for rank in ranks):
        return None
    in_turn, together = 2 * m * k * (3 * count + 1), 2 * m * (2 * k + wide)
    if together <= in_turn:
        return None
    return f"{together / 1e6:.0f} MB would be moved together, for K={k} and N {wide} in all, and {in_turn / 1e6:.0f} so"


def forward(
    x: jax.Array,
    ws: Arrays,
    a_s: Arrays,
    b_s: Arrays,
    drop: Drop | None = None,
    *,
    biases: Sequence[jax.Array | None],
    sms: int | None = None,
    interpret: Any = None,
) -> tuple[list[jax.Array], jax.Array]:
    """(M, K), each (K, N), (K, R), (R, N) and (N,) or None -> each (M, N), and `h` for `backward`.

    N and R may differ. Dtypes and roundings as in `mosaic_lora.forward`.
    """
    m, sms = x.shape[0], sms or multiprocessors()
    rank_first, thins = h_layout([b.shape[0] for b in b_s])
    rows, k, _ = padded_sizes(m, x.shape[1], 0)
    if drop is None and interpret is None and rank_first and mosaic_lora.in_one_kernel(k, thins[0]):
        each = zip(ws, a_s, b_s, biases, strict=True)
        found = [mosaic_lora.forward(x, w, a, b, bias=bias, sms=sms) for w, a, b, bias in each]
        return [y for y, _ in found], jnp.concatenate([h for _, h in found])
    x = pad(x, rows, k)
    stacked = jnp.concatenate([pad(a.T, thin, k) for a, thin in zip(a_s, thins, strict=True)])
    config = tuned.down_config(rows, k, sum(thins), sms, dropped=drop is not None)
    h = down(x, stacked, config, by_rank=rank_first, interpret=interpret, **_options(drop))
    ys = []
    for w, b, bias, part in zip(ws, b_s, biases, _parts(thins), strict=True):
        n = w.shape[1]
        width = padded_sizes(0, 0, n)[2]
        bias = None if bias is None else jnp.pad(bias, (0, width - n))
        config = tuned.gemm_config(rows, k, width, part[1])
        y = gemm(
            x, pad(w, k, width), h, pad(b, part[1], width), config, part=part, bias=bias, sms=sms, interpret=interpret
        )
        ys.append(y[:m, :n])
    return ys, h


def backward(
    dys: Arrays,
    x: jax.Array,
    ws: Arrays,
    a_s: Arrays,
    b_s: Arrays,
    h: jax.Array,
    drop: Drop | None = None,
    *,
    wants: Wants = Wants(),  # noqa: B008
    sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array | None, list[jax.Array] | None, list[jax.Array] | None]:
    """Gradients of `forward`: of `x` in its dtype, of each `a` and each `b` in float32, or None where not wanted."""
    ranks, ns = [b.shape[0] for b in b_s], [w.shape[1] for w in ws]
    rank_first, thins = h_layout(ranks)
    shape, rank, sms = x.shape, padded_rank(sum(ranks)), sms or multiprocessors()
    rows, k, _ = padded_sizes(shape[0], shape[1], 0)
    widths = [padded_sizes(0, 0, n)[2] for n in ns]
    x = pad(x, rows, k)
    dys = tuple(pad(dy, rows, width) for dy, width in zip(dys, widths, strict=True))
    dx = das = dbs = None
    if wants.x or wants.a:
        # Each `B` in ranks of its own and zeros in the others': the sum of their products is `g` of all.
        placed = tuple(
            jnp.pad(b, ((first, rank - first - r), (0, width - b.shape[1])))
            for b, (first, r), width in zip(b_s, _parts(ranks), widths, strict=True)
        )
        g = down(dys, placed, tuned.down_config(rows, sum(widths), rank, sms), interpret=interpret)
        if wants.x:
            config = tuned.gemm_config(rows, sum(widths), k, rank, dropped=drop is not None, transposed=True)
            tail = pad(jnp.concatenate(a_s, 1), k, rank)
            weights = tuple(pad(w, k, width) for w, width in zip(ws, widths, strict=True))
            dx = gemm(
                dys, weights, g, tail if in_ring(rank) else tail.T, config,
                transposed=True, sms=sms, interpret=interpret, **_options(drop),
            )[: shape[0], : shape[1]]  # fmt: skip
        if wants.a:
            config = tuned.outer_config(rows, k, rank, sms, dropped=drop is not None)
            (da,) = outer([(x, g)], config, interpret=interpret, **_options(drop))
            das = [da[: shape[1], first : first + r] for first, r in _parts(ranks)]
    if wants.b:
        # Rank-major it is copied in tiles of 64 rows.
        h = pad(h, h.shape[0], -(-h.shape[1] // 64) * 64) if rank_first else pad(h, max(h.shape[0], rows), h.shape[1])
        dbs = []
        for dy, part, r, n in zip(dys, _parts(thins), ranks, ns, strict=True):
            config = tuned.outer_config(rows, dy.shape[1], part[1], sms)
            (db,) = outer([(dy, h)], config, part=part, interpret=interpret)
            dbs.append(db.T[:r, :n])
    return dx, das, dbs


def _parts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(first, size) of each of what lies one after the other."""
    return list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))


def _options(drop: Drop | None) -> dict[str, Any]:
    return {} if drop is None else drop._asdict()
