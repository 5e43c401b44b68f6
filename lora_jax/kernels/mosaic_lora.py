"""Hopper: `y = x·W + drop(x)·A·B (+ bias)` and its derivative, out of the `mosaic_` kernels.

Forward: `h = drop(x)·A`, and the product with its tail. Backward: `g = dy·Bᵀ`, the product `dy·Wᵀ + mask·(g·Aᵀ)`, then
`dA = drop(x)ᵀ·g` with `dB = hᵀ·dy`. Each product is one kernel with its thin one (`mosaic_adapted`) for ranks up to 16,
except with dropout forward, else two (`mosaic_down`, `mosaic_gemm`); `mosaic_outer` is the last. Nothing of the size of
`y` or `x` is written beside the results.

Here the operands get the shapes that the kernels want: the rank padded to 16 or a multiple of 64, ragged edges to
multiples of 8 (M) and 64 (K, N). The first costs next to nothing; the last copies `x` and `W`, so that aligned sizes
are the fast path.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import _compat
from lora_jax.kernels import mosaic, mosaic_adapted, tuned
from lora_jax.kernels.gemm_config import K_TILE, in_ring, padded_rank
from lora_jax.kernels.gemm_config import unsupported as gemm_unsupported
from lora_jax.kernels.linear import Drop as Drop
from lora_jax.kernels.linear import Wants as Wants
from lora_jax.kernels.mosaic_adapted import adapted
from lora_jax.kernels.mosaic_down import down
from lora_jax.kernels.mosaic_gemm import gemm
from lora_jax.kernels.mosaic_outer import outer
from lora_jax.kernels.mosaic_stages import stages as stages


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
    sizes = (("M", m, 8), ("K", k, K_TILE), ("N", n, K_TILE))
    if ragged := [f"{name}={size} is no multiple of {of}" for name, size, of in sizes if size % of]:
        return f"{', '.join(ragged)}: the operands would be copied to pad them"
    return tuned.slower("mosaic_gpu", m, k, n, rank, dropped, device_kind)


def faster(m: int, k: int, n: int, rank: int, dropped: bool, device_kind: str) -> str:
    """What says that they are the better choice, where `slower` says nothing."""
    return tuned.faster("mosaic_gpu", m, k, n, rank, dropped, device_kind)


def in_one_kernel(k: int, rank: int) -> bool:
    """Whether `mosaic_adapted` may compute a product over K together with its thin one, padded sizes given.

    Its clusters wait for each other: it must be known how many multiprocessors there are. Jax 0.10 can't store `h`
    transposed.
    """
    known = _compat.target_device().multiprocessors is not None
    return rank == mosaic_adapted.RANK and k // K_TILE > mosaic_adapted.STAGES and known and mosaic.STORES_TRANSPOSED


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
    sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`x·w + drop(x)·a·b`: (M, K), (K, N) or (N, K) if `transposed`, (K, R), (R, N) -> (M, N), and `h` for `backward`.

    All of one dtype, bfloat16 or float16, which `h` and the result are rounded to once each. `bias`: (N,), of that
    dtype or float32, added before the result is rounded. `sms`: multiprocessors, those of the GPU here if None.
    """
    m, n = x.shape[0], b.shape[1]
    x, w, a_t, b = _pad_operands(x, w, a, b, transposed)
    rows, k, out, rank = x.shape[0], x.shape[1], b.shape[1], a_t.shape[0]
    sms = sms or multiprocessors()
    if bias is not None:
        bias = jnp.pad(bias, (0, out - n))
    if drop is None and interpret is None and in_one_kernel(k, rank):
        y, h = adapted(x, w, a_t, b, transposed=transposed, bias=bias, sms=sms)
        return y[:m, :n], h
    options = {} if drop is None else drop._asdict()
    h = down(x, a_t, tuned.down_config(rows, k, rank, sms, dropped=drop is not None), interpret=interpret, **options)
    tail = b.T if transposed and in_ring(rank) else b
    config = tuned.gemm_config(rows, k, out, rank, transposed=transposed)
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
    sms: int | None = None,
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
    sms = sms or multiprocessors()
    dx = g = None
    if wants.x and interpret is None and in_one_kernel(n, rank):
        dx, g = adapted(dy, w, b, a_t, transposed=not transposed, sms=sms, **options)
    elif wants.x or wants.a:
        g = down(dy, b, tuned.down_config(rows, n, rank, sms), interpret=interpret)
        if wants.x:
            config = tuned.gemm_config(rows, n, k, rank, dropped=drop is not None, transposed=not transposed)
            tail = a_t.T if not transposed and in_ring(rank) else a_t
            dx = gemm(dy, w, g, tail, config, transposed=not transposed, sms=sms, interpret=interpret, **options)
    pairs = [(x, g)] if wants.a and g is not None else []
    pairs += [(dy, h)] if wants.b else []
    da = db = None
    if pairs:
        config = tuned.outer_config(rows, sum(x.shape[1] for x, _ in pairs), rank, sms, dropped=bool(options))
        found = outer(pairs, config, interpret=interpret, **(options if wants.a else {}))
        da = found[0][: shape[1], :r] if wants.a else None
        db = found[-1].T[:r, : shape[2]] if wants.b else None
    return None if dx is None else dx[: shape[0], : shape[1]], da, db


def multiprocessors() -> int:
    """Of the GPU that is compiled for; where unknown, of an H100 or H200."""
    return _compat.target_device().multiprocessors or 132


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
