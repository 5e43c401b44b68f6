"""Hopper: `dA = drop(x)ᵀ·g`, one pass over `x`, summed over its rows.

Letters as in `mosaic_gemm`; `g` is thin, as `mosaic_down` gives it. The same kernel gives `dBᵀ = dyᵀ·h`, with `dy` for
`x`.

A CTA owns `columns` columns of `x` and one of `splits` runs of rows. The float32 partial sums of the splits are added
in order afterwards: the result does not depend on which CTA came first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lora_jax.kernels import mosaic
from lora_jax.kernels.counter_bits import rescaling
from lora_jax.kernels.gemm_config import in_ring, rank_of
from lora_jax.kernels.mosaic_dropout import mask_in_place


@dataclass(frozen=True)
class OuterConfig:
    columns: int = 128
    rows: int = 64  # copied at a time
    stages: int = 6
    workers: int = 2
    splits: int = 4  # of M

    def shared_bytes(self, rank: int) -> int:
        ring = 2 * self.stages * self.rows * (self.columns + rank)
        return ring + 4 * self.columns * rank * self.workers


def outer(
    x: jax.Array,
    g: jax.Array,
    config: OuterConfig,
    *,
    part: tuple[int, int] | None = None,
    seed: jax.Array | None = None,
    threshold: int = 0,
    interpret: Any = None,
) -> jax.Array:
    """`drop(x)ᵀ·g`: (M, K), thin -> (K, R) float32. `thin` is (R, M or more), or (M or more, R) for R in the ring.

    `seed` and `threshold` as in `mosaic_down.down`. R is a multiple of 16, K of 64. Rows of `g` beyond M must be
    finite. `part`: (first, R) of the ranks of `g`, if not all, as in `mosaic_gemm`.
    """
    c = config
    first, rank = part or (0, rank_of(g))
    k = x.shape[1]
    blocks = pl.cdiv(k, c.columns)
    operands = [x, g, *([] if seed is None else [seed])]

    def body(x_g, g_g, *rest):
        _kernel(x_g, g_g, rest[0] if seed is not None else None, rest[-1], first=first, config=c, threshold=threshold)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((c.splits, blocks * c.columns, rank), jnp.float32),
        grid=(blocks, c.splits),
        grid_names=("columns", "split"),
        num_threads=c.workers + 1,
        thread_name="wg",
        compiler_params=mosaic.compiler_params(),
        **mosaic.interpreted(interpret),
    )(*operands)
    return (out.sum(0) if c.splits > 1 else out[0])[:k]


def _kernel(x_g, g_g, seed_g, out_g, *, first: int, config: OuterConfig, threshold: int):
    c = config
    dtype, rank = x_g.dtype, out_g.shape[2]
    by_rank = not in_ring(rank)
    steps = pl.cdiv(pl.cdiv(x_g.shape[0], c.rows), c.splits)
    column0, split = lax.axis_index("columns") * c.columns, lax.axis_index("split")

    @functools.partial(
        pl.run_scoped,
        x_s=mosaic.shared((c.stages, c.rows, c.columns), dtype),
        g_s=mosaic.shared((c.stages, rank, c.rows) if by_rank else (c.stages, c.rows, rank), dtype),
        out_s=plgpu.SMEM((c.columns, rank), jnp.float32),
        others_s=plgpu.SMEM((max(c.workers - 1, 1), c.columns, rank), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=c.stages),
        free=plgpu.Barrier(num_arrivals=1, num_barriers=c.stages),
        ready=plgpu.Barrier(num_arrivals=max(c.workers - 1, 1)),
        collective_axes="wg",
    )
    def _(x_s, g_s, out_s, others_s, full, free, ready):
        def load(slot, step):
            ms = pl.ds((split * steps + step) * c.rows, c.rows)
            plgpu.copy_gmem_to_smem(x_g.at[ms, pl.ds(column0, c.columns)], x_s.at[slot], full.at[slot])
            ranks = pl.ds(first, rank)
            plgpu.copy_gmem_to_smem(g_g.at[ranks, ms] if by_rank else g_g.at[ms, ranks], g_s.at[slot], full.at[slot])

        def multiply(acc):
            def use(slot, step):
                if seed_g is not None:
                    mask_in_place(x_s.at[slot], seed_g, (split * steps + step) * c.rows, column0, threshold)
                g = mosaic.transpose(g_s.at[slot]) if by_rank else g_s.at[slot]
                plgpu.wgmma(acc, mosaic.transpose(x_s.at[slot]), g)

            mosaic.drain(steps, c.stages, use, full, free, c.workers)
            return acc[...]

        def store(out):
            if seed_g is not None:
                out *= rescaling(threshold)
            out_s[...] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, out_g.at[split].at[pl.ds(column0, c.columns)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(lax.axis_index("wg") == c.workers)
        def _():
            mosaic.fill(steps, c.stages, load, free)

        @pl.when(lax.axis_index("wg") < c.workers)
        def _():
            own = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((c.columns, rank), jnp.float32))
            mosaic.summed(own, others_s, ready, store, c.workers)
