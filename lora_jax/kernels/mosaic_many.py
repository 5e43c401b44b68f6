"""Hopper: `y = x·W + x·A[i]·B[i]` and its derivative, where each run of rows has an `i`, and factors, of its own.

The kernels of one adapter, whose tiles lie within a run and take that one's factors: `mosaic_adapted`, or
`mosaic_down` with `mosaic_gemm`, and `mosaic_outer`. `W` is multiplied once for all runs, and nothing of the size of
`y` or `x` is written beside the results. Runs are equally long, in whole tiles.

Oracle: `lora_jax/reference.py`. Checked by: `tests/kernels/test_mosaic_many.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.kernels import mosaic_lora, tuned
from lora_jax.kernels.gemm_config import SHARED_BYTES, GemmConfig, in_ring, padded_rank
from lora_jax.kernels.gemm_config import unsupported as gemm_unsupported
from lora_jax.kernels.linear import Wants
from lora_jax.kernels.mosaic_adapted import adapted
from lora_jax.kernels.mosaic_down import down
from lora_jax.kernels.mosaic_gemm import gemm
from lora_jax.kernels.mosaic_outer import OuterConfig, outer

# Of a run the tiles hold all of 256 rows or of 128: shorter ones leave the tensor cores idle.
_TILES = (GemmConfig(), GemmConfig(split="n", cluster=""))


def unsupported(m: int, k: int, n: int, rank: int, runs: int, dtype: Any) -> str | None:
    """Why the kernels can't compute `runs` runs of M rows in all, or None."""
    if problem := mosaic_lora.unsupported(m, k, n, rank, dtype):
        return problem
    if m % runs:
        return f"{m} rows are not {runs} equal runs"
    for contracted, out in ((k, n), (n, k)):
        problems = [_unsupported(m, contracted, out, rank, m // runs, config) for config in _TILES]
        if all(problems):
            return problems[-1]
    return None


def _unsupported(m: int, k: int, n: int, rank: int, run: int, config: GemmConfig) -> str | None:
    return gemm_unsupported(m, k, n, padded_rank(rank), config, run=run)


def forward(
    x: jax.Array,
    w: jax.Array,
    a_s: jax.Array,
    b_s: jax.Array,
    *,
    transposed: bool = False,
    sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`x·w + x·a·b`: (M, K), (K, N) or (N, K) if `transposed`, (runs, K, R), (runs, R, N) -> (M, N), and `h`.

    Dtypes, roundings, `sms` and the layout of `h` as in `mosaic_lora.forward`.
    """
    a_t, b_s = _padded(a_s, b_s)
    return _product(x, w, a_t, b_s, transposed, sms, interpret)


def backward(
    dy: jax.Array,
    x: jax.Array,
    w: jax.Array,
    a_s: jax.Array,
    b_s: jax.Array,
    h: jax.Array,
    *,
    transposed: bool = False,
    wants: Wants = Wants(),  # noqa: B008
    sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Gradients of `forward`: of `x` in its dtype, of `a_s` and `b_s` in float32; None where not wanted."""
    runs, _, r = a_s.shape
    a_t, b_s = _padded(a_s, b_s)
    rank = a_t.shape[1]
    sms = sms or mosaic_lora.multiprocessors()
    dx = g = None
    if wants.x:
        dx, g = _product(dy, w, b_s, a_t, not transposed, sms, interpret)
    elif wants.a:
        m, n = dy.shape
        g = down(dy, b_s, tuned.down_config(m, n, rank, sms), interpret=interpret)
    pairs = [(x, g)] if wants.a and g is not None else []
    pairs += [(dy, h)] if wants.b else []
    da = db = None
    if pairs:
        found = outer(pairs, outer_config(rank, runs), apart=True, interpret=interpret)
        da = found[0][:, :, :r] if wants.a else None
        db = found[-1].swapaxes(1, 2)[:, :r] if wants.b else None
    return dx, da, db


def _product(
    x: jax.Array, w: jax.Array, down_t: jax.Array, up: jax.Array, transposed: bool, sms: int | None, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """`x·w + x·down_tᵀ·up`, and the thin product: the forward pass, or with factors swapped that of `dy`."""
    (m, k), (runs, rank, n) = x.shape, up.shape
    sms = sms or mosaic_lora.multiprocessors()
    if interpret is None and mosaic_lora.in_one_kernel(k, rank):
        return adapted(x, w, down_t, up, transposed=transposed, sms=sms)
    thin = down(x, down_t, tuned.down_config(m, k, rank, sms), interpret=interpret)
    tail = up.swapaxes(1, 2) if transposed and in_ring(rank) else up
    config = gemm_config(m, k, n, rank, runs)
    return gemm(x, w, thin, tail, config, transposed=transposed, sms=sms, interpret=interpret), thin


def gemm_config(m: int, k: int, n: int, rank: int, runs: int) -> GemmConfig:
    return next(c for c in _TILES if _unsupported(m, k, n, rank, m // runs, c) is None)


def outer_config(rank: int, runs: int) -> OuterConfig:
    """A short sum for each run: few stages, so that two CTAs fit and one begins while another ends."""
    short = (OuterConfig(columns=128, splits=runs, stages=4), OuterConfig(columns=64, splits=runs, stages=2, workers=1))
    return next(c for c in short if c.shared_bytes(padded_rank(rank)) <= SHARED_BYTES)


def _padded(a_s: jax.Array, b_s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a_sᵀ` and `b_s`, ranks padded with zeros."""
    more = padded_rank(a_s.shape[2]) - a_s.shape[2]
    # Transposed by a kernel of XLA's for that: within the one that gathers `a_s` it takes twice as long.
    a_s = lax.optimization_barrier(a_s)
    a_t = jnp.pad(a_s.swapaxes(1, 2), ((0, 0), (0, more), (0, 0)))
    return a_t, jnp.pad(b_s, ((0, 0), (0, more), (0, 0)))
