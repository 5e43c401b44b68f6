"""Hopper: `h = drop(x)·A`, one pass over `x`, as thin operand of `mosaic_gemm` and `mosaic_outer`.

Letters as in `mosaic_gemm`. The same kernel gives `g = dy·(sB)ᵀ`, with `dy` for `x` and `B` for `Aᵀ`.

A CTA owns `rows` rows and walks along K: one warpgroup copies, `workers` multiply in turn. Bound by memory, so that all
that counts is bytes in flight; with dropout by the arithmetic of the mask, which is what more workers are for. Few
rows: K is cut into `splits` as well, and the float32 partial sums are added after, in order.
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
from lora_jax.kernels.gemm_config import in_ring
from lora_jax.kernels.mosaic_dropout import mask_in_place


@dataclass(frozen=True)
class DownConfig:
    rows: int = 64
    depth: int = 128  # of K, copied at a time
    stages: int = 6
    workers: int = 2
    splits: int = 1  # of K

    def shared_bytes(self, rank: int) -> int:
        ring = 2 * self.stages * (self.rows + rank) * self.depth
        return ring + 4 * self.rows * rank * self.workers


def down(
    x: jax.Array,
    a_t: jax.Array,
    config: DownConfig,
    *,
    seed: jax.Array | None = None,
    threshold: int = 0,
    interpret: Any = None,
) -> jax.Array:
    """`drop(x)·a_tᵀ`: (M, K), (R, K) -> thin (R, M rounded up to the tile), or (M rounded up, R) for R in the ring.

    Of `x`'s dtype, summed in float32. With a `seed` (see `mosaic_dropout.Mask`), elements whose 16 bits lie under
    `threshold` are dropped and the sums are multiplied by 65536 / (65536 - threshold), in float32. Rows beyond M are
    zero. R is a multiple of 16, K of 64.
    """
    c = config
    rank = a_t.shape[0]
    blocks = pl.cdiv(x.shape[0], c.rows)
    by_rank = not in_ring(rank) and c.splits == 1 and mosaic.STORES_TRANSPOSED
    shape = (rank, blocks * c.rows) if by_rank else (blocks * c.rows, rank)
    dtype = x.dtype
    if c.splits > 1:
        shape, dtype = (c.splits, *shape), jnp.float32
    operands = [x, a_t, *([] if seed is None else [seed])]

    def lora_down(x_g, a_g, *rest):
        _kernel(
            x_g, a_g, rest[0] if seed is not None else None, rest[-1], config=c, by_rank=by_rank, threshold=threshold
        )

    out = plgpu.kernel(
        lora_down,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(blocks, c.splits),
        grid_names=("rows", "split"),
        num_threads=c.workers + 1,
        thread_name="wg",
        compiler_params=mosaic.compiler_params(),
        **mosaic.interpreted(interpret),
    )(*operands)
    if c.splits > 1:
        out = out.sum(0).astype(x.dtype)
    return out if by_rank or in_ring(rank) else out.T


def _kernel(x_g, a_g, seed_g, h_g, *, config: DownConfig, by_rank: bool, threshold: int):
    c = config
    dtype, rank = x_g.dtype, a_g.shape[0]
    steps = pl.cdiv(pl.cdiv(x_g.shape[1], c.depth), c.splits)
    row0, split = lax.axis_index("rows") * c.rows, lax.axis_index("split")

    @functools.partial(
        pl.run_scoped,
        x_s=mosaic.shared((c.stages, c.rows, c.depth), dtype),
        a_s=mosaic.shared((c.stages, rank, c.depth), dtype),
        h_s=plgpu.SMEM((rank, c.rows) if by_rank else (c.rows, rank), h_g.dtype),
        others_s=plgpu.SMEM((max(c.workers - 1, 1), c.rows, rank), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=c.stages),
        free=plgpu.Barrier(num_arrivals=1, num_barriers=c.stages),
        ready=plgpu.Barrier(num_arrivals=max(c.workers - 1, 1)),
        collective_axes="wg",
    )
    def _(x_s, a_s, h_s, others_s, full, free, ready):
        def load(slot, step):
            ks = pl.ds((split * steps + step) * c.depth, c.depth)
            plgpu.copy_gmem_to_smem(x_g.at[pl.ds(row0, c.rows), ks], x_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(a_g.at[:, ks], a_s.at[slot], full.at[slot])

        def multiply(acc):
            def use(slot, step):
                if seed_g is not None:
                    mask_in_place(x_s.at[slot], seed_g, row0, (split * steps + step) * c.depth, threshold)
                plgpu.wgmma(acc, x_s.at[slot], mosaic.transpose(a_s.at[slot]))

            mosaic.drain(steps, c.stages, use, full, free, c.workers)
            return acc[...]

        def store(h):
            if seed_g is not None:
                h *= rescaling(threshold)
            out_g = h_g if c.splits == 1 else h_g.at[split]
            rows = pl.ds(row0, c.rows)
            if by_rank:
                mosaic.transpose(h_s)[...] = h.astype(h_g.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(h_s, out_g.at[:, rows])
            else:
                h_s[...] = h.astype(h_g.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(h_s, out_g.at[rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(lax.axis_index("wg") == c.workers)
        def _():
            mosaic.fill(steps, c.stages, load, free)

        @pl.when(lax.axis_index("wg") < c.workers)
        def _():
            own = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((c.rows, rank), jnp.float32))
            mosaic.summed(own, others_s, ready, store, c.workers)
