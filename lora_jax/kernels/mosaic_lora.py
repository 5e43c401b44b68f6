"""Hopper: `y = x·W + drop(x)·A·B (+ bias)` and its derivative, out of `mosaic_down`, `mosaic_gemm` and `mosaic_outer`.

Forward, two kernels: `h = drop(x)·A`, then the product with its tail. Backward, four: `g = dy·Bᵀ`, the product
`dy·Wᵀ + mask·(g·Aᵀ)`, `dA = drop(x)ᵀ·g`, `dB = hᵀ·dy`. Nothing of the size of `y` or `x` is written beside the results.

Here the operands get the shapes that the kernels want: the rank padded to 16 or a multiple of 64, ragged edges to
multiples of 8 (M) and 64 (K, N). The first costs next to nothing; the last copies `x` and `W`, so that aligned sizes
are the fast path.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.kernels import tuned
from lora_jax.kernels.gemm_config import K_TILE, in_ring, padded_rank
from lora_jax.kernels.gemm_config import unsupported as gemm_unsupported
from lora_jax.kernels.mosaic_down import down
from lora_jax.kernels.mosaic_gemm import gemm
from lora_jax.kernels.mosaic_outer import outer

# At 256 rows XLA is the faster (benchmarks/results/kernels.jsonl); between there and here nothing was measured.
LEAST_ROWS = 2048


class Drop(NamedTuple):
    """Dropout of the low-rank branch: four int32 (see `mosaic_dropout.Mask`), and how many of 65536 are dropped."""

    seed: jax.Array
    threshold: int


class Wants(NamedTuple):
    """Which gradients somebody asked for."""

    x: bool = True
    a: bool = True
    b: bool = True


def unsupported(m: int, k: int, n: int, rank: int, dtype: Any) -> str | None:
    """Why the kernels can't compute these sizes, padding included, or None."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype).name} operands; the kernels take bfloat16 and float16"
    if rank > 256:
        return f"rank {rank}; the kernels take up to 256"
    (m, k, n), rank = padded_sizes(m, k, n), padded_rank(rank)
    for contracted, out in ((k, n), (n, k)):
        for masked in (False, True):
            config = tuned.gemm_config(m, contracted, out, rank, dropped=masked)
            problem = gemm_unsupported(m, contracted, out, rank, config, masked=masked)
            if problem:
                return problem
    return None


def slower(m: int, k: int, n: int, rank: int, dtype: Any, dropped: bool, device_kind: str) -> str | None:
    """Why XLA is the better choice for these sizes, although the kernels could compute them, or None."""
    if m % 8 or k % K_TILE or n % K_TILE:
        return (
            f"M={m} is no multiple of 8, or K={k} or N={n} none of {K_TILE}: the operands would be copied to pad them"
        )
    if m < LEAST_ROWS:
        return f"M={m}; below {LEAST_ROWS} rows the kernels are not the faster ones"
    return None


def h_layout(rank: int) -> tuple[bool, int]:
    """Whether the rank comes first in the `h` of `forward`, and how long it is there, padding included."""
    padded = padded_rank(rank)
    return not in_ring(padded), padded


def forward(
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    drop: Drop | None = None,
    *,
    transposed: bool = False,
    bias: jax.Array | None = None,
    sms: int = 132,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`x·w + drop(x)·a·b`: (M, K), (K, N) or (N, K) if `transposed`, (K, R), (R, N) -> (M, N), and `h` for `backward`.

    All of one dtype, bfloat16 or float16, which `h` and the result are rounded to once each. `bias`: (N,), of that
    dtype or float32, added before the result is rounded. `sms`: multiprocessors of the GPU.
    """
    m, n = x.shape[0], b.shape[1]
    x, w, a_t, b = _pad_operands(x, w, a, b, transposed)
    rows, k, out, rank = x.shape[0], x.shape[1], b.shape[1], a_t.shape[0]
    options = {} if drop is None else drop._asdict()
    h = down(x, a_t, tuned.down_config(rows, k, rank, sms), interpret=interpret, **options)
    tail = b.T if transposed and in_ring(rank) else b
    config = tuned.gemm_config(rows, k, out, rank)
    if bias is not None:
        bias = jnp.pad(bias, (0, out - n))
    y = gemm(x, w, h, tail, config, transposed=transposed, bias=bias, sms=sms, interpret=interpret)
    return y[:m, :n], h


def backward(
    dy: jax.Array,
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    h: jax.Array,
    drop: Drop | None = None,
    *,
    transposed: bool = False,
    wants: Wants = Wants(),  # noqa: B008
    sms: int = 132,
    interpret: Any = None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Gradients of `forward`: of `x` in its dtype, of `a` and `b` in float32, or None where not wanted.

    `h` may be cut to M.
    """
    shape, r = (*x.shape, b.shape[1]), a.shape[1]
    x, w, a_t, b = _pad_operands(x, w, a, b, transposed)
    rows, k, n, rank = x.shape[0], x.shape[1], b.shape[1], a_t.shape[0]
    dy = pad(dy, rows, n)
    # Rank-major it is copied in tiles of 64 rows.
    h = pad(h, max(h.shape[0], rows), rank) if in_ring(rank) else pad(h, rank, -(-h.shape[1] // 64) * 64)
    options = {} if drop is None else drop._asdict()
    dx = da = db = None
    if wants.x or wants.a:
        g = down(dy, b, tuned.down_config(rows, n, rank, sms), interpret=interpret)
        if wants.x:
            config = tuned.gemm_config(rows, n, k, rank, dropped=drop is not None)
            tail = a_t.T if not transposed and in_ring(rank) else a_t
            dx = gemm(
                dy, w, g, tail, config, transposed=not transposed, sms=sms, interpret=interpret, **options
            )[: shape[0], : shape[1]]  # fmt: skip
        if wants.a:
            da = outer(x, g, tuned.outer_config(rows, k, rank, sms), interpret=interpret, **options)[: shape[1], :r]
    if wants.b:
        db = outer(dy, h, tuned.outer_config(rows, n, rank, sms), interpret=interpret).T[:r, : shape[2]]
    return dx, da, db


def padded_sizes(m: int, k: int, n: int) -> tuple[int, int, int]:
    """What the kernels take M, K and N for."""
    return -(-m // 8) * 8, -(-k // K_TILE) * K_TILE, -(-n // K_TILE) * K_TILE


def _pad_operands(
    x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, transposed: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`x`, `w`, `aᵀ` and `b` with zeros around."""
    rank = padded_rank(a.shape[1])
    m, k, n = padded_sizes(x.shape[0], x.shape[1], b.shape[1])
    return pad(x, m, k), pad(w, n, k) if transposed else pad(w, k, n), pad(a.T, rank, k), pad(b, rank, n)


def pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """With zeros below and to the right."""
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))
