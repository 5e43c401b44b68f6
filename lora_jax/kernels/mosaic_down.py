"""Hopper: `hᵀ = (drop(x)·A)ᵀ`, one pass over `x`, written rank-major for `mosaic_gemm` and `mosaic_outer`.

Letters as in `mosaic_gemm`. The same kernel gives `gᵀ = (dy·(sB)ᵀ)ᵀ`, with `dy` for `x` and `B` for `Aᵀ`.

A CTA owns `rows` rows and walks along K: one warpgroup copies, one multiplies. Bound by memory, so that all that
counts is bytes in flight. Few rows: K is cut into `splits` as well, and the float32 partial sums are added after.
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
from lora_jax.kernels.mosaic_dropout import mask_in_place


@dataclass(frozen=True)
class DownConfig:
    rows: int = 64
    depth: int = 256  # of K, copied at a time
    stages: int = 4
    splits: int = 1  # of K

    def shared_bytes(self, rank: int) -> int:
        return 2 * self.stages * (self.rows + rank) * self.depth + 4 * self.rows * rank


def down(
    x: jax.Array,
    a_t: jax.Array,
    config: DownConfig,
    *,
    seed: jax.Array | None = None,
    threshold: int = 0,
    interpret: Any = None,
) -> jax.Array:
    """`(drop(x)·a_tᵀ)ᵀ`: (M, K), (R, K) -> (R, M rounded up to the tile), of `x`'s dtype.

    With a `seed` (four int32: see `mosaic_dropout.keep`), elements whose 16 bits lie under `threshold` are dropped
    and the sums are multiplied by 65536 / (65536 - threshold), in float32. Rows beyond M are zero. R a multiple of
    16, K of 8.
    """
    c = config
    (m, k), rank = x.shape, a_t.shape[0]
    blocks = pl.cdiv(m, c.rows)
    partial = c.splits > 1
    shape = (c.splits, blocks * c.rows, rank) if partial else (rank, blocks * c.rows)
    run = plgpu.kernel(
        functools.partial(_kernel if seed is not None else _without_seed, config=c, threshold=threshold),
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32 if partial else x.dtype),
        grid=(blocks, c.splits),
        grid_names=("rows", "split"),
        num_threads=2,
        thread_name="wg",
        compiler_params=mosaic.compiler_params(),
        **mosaic.interpreted(interpret),
    )
    out = run(x, a_t) if seed is None else run(x, a_t, seed)
    return out.sum(0).T.astype(x.dtype) if partial else out


def _without_seed(x_g, a_g, h_g, **options):
    _kernel(x_g, a_g, None, h_g, **options)


def _kernel(x_g, a_g, seed_g, h_g, *, config: DownConfig, threshold: int):
    c = config
    dtype, rank = x_g.dtype, a_g.shape[0]
    steps = pl.cdiv(pl.cdiv(x_g.shape[1], c.depth), c.splits)
    stages = min(c.stages, steps)
    row0, split = lax.axis_index("rows") * c.rows, lax.axis_index("split")
    partial = len(h_g.shape) == 3

    @functools.partial(
        pl.run_scoped,
        x_s=mosaic.shared((stages, c.rows, c.depth), dtype),
        a_s=mosaic.shared((stages, rank, c.depth), dtype),
        h_s=plgpu.SMEM((c.rows, rank) if partial else (rank, c.rows), h_g.dtype),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        collective_axes="wg",
    )
    def _(x_s, a_s, h_s, full, free):
        def load(slot, step):
            ks = pl.ds((split * steps + step) * c.depth, c.depth)
            plgpu.copy_gmem_to_smem(x_g.at[pl.ds(row0, c.rows), ks], x_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(a_g.at[:, ks], a_s.at[slot], full.at[slot])

        def multiply(acc):
            def use(slot, step):
                if seed_g is not None:
                    mask_in_place(x_s.at[slot], seed_g, row0, (split * steps + step) * c.depth, threshold)
                plgpu.wgmma(acc, x_s.at[slot], mosaic.transpose(a_s.at[slot]))

            mosaic.drain(steps, stages, use, full, free)
            return acc[...]

        @pl.when(lax.axis_index("wg") == 1)
        def _():
            mosaic.fill(steps, stages, load, free)

        @pl.when(lax.axis_index("wg") == 0)
        def _():
            h = pl.run_scoped(multiply, plgpu.ACC((c.rows, rank), jnp.float32))
            if seed_g is not None:
                h *= 65536 / (65536 - threshold)
            if partial:
                h_s[...] = h
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(h_s, h_g.at[split].at[pl.ds(row0, c.rows)])
            else:
                mosaic.transpose(h_s)[...] = h.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(h_s, h_g.at[:, pl.ds(row0, c.rows)])
            plgpu.wait_smem_to_gmem(0)
