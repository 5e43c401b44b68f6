"""Hopper: `dA = drop(x)ᵀ·g`, one pass over `x`, summed over its rows.

Letters as in `mosaic_gemm`; `g` comes rank-major, (R, M). The same kernel gives `dBᵀ = dyᵀ·h`, with `dy` for `x`.

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
from lora_jax.kernels.mosaic_dropout import mask_in_place


@dataclass(frozen=True)
class OuterConfig:
    columns: int = 128
    rows: int = 64  # copied at a time
    stages: int = 8
    splits: int = 4  # of M

    def shared_bytes(self, rank: int) -> int:
        return 2 * self.stages * self.rows * (self.columns + rank) + 4 * self.columns * rank


def outer(
    x: jax.Array,
    g_t: jax.Array,
    config: OuterConfig,
    *,
    seed: jax.Array | None = None,
    threshold: int = 0,
    interpret: Any = None,
) -> jax.Array:
    """`drop(x)ᵀ·g_tᵀ`: (M, K), (R, M or more) -> (K, R) float32. R a multiple of 16, K and `g_t`'s length of 8.

    `seed` and `threshold` as in `mosaic_down.down`. Columns of `g_t` beyond M must be finite.
    """
    c = config
    (m, k), rank = x.shape, g_t.shape[0]
    blocks = pl.cdiv(k, c.columns)
    run = plgpu.kernel(
        functools.partial(_kernel if seed is not None else _without_seed, config=c, threshold=threshold),
        out_type=jax.ShapeDtypeStruct((c.splits, blocks * c.columns, rank), jnp.float32),
        grid=(blocks, c.splits),
        grid_names=("columns", "split"),
        num_threads=2,
        thread_name="wg",
        compiler_params=mosaic.compiler_params(),
        **mosaic.interpreted(interpret),
    )
    out = run(x, g_t) if seed is None else run(x, g_t, seed)
    return out.sum(0)[:k]


def _without_seed(x_g, g_g, out_g, **options):
    _kernel(x_g, g_g, None, out_g, **options)


def _kernel(x_g, g_g, seed_g, out_g, *, config: OuterConfig, threshold: int):
    c = config
    dtype, rank = x_g.dtype, g_g.shape[0]
    steps = pl.cdiv(pl.cdiv(x_g.shape[0], c.rows), c.splits)
    stages = min(c.stages, steps)
    column0, split = lax.axis_index("columns") * c.columns, lax.axis_index("split")

    @functools.partial(
        pl.run_scoped,
        x_s=mosaic.shared((stages, c.rows, c.columns), dtype),
        g_s=mosaic.shared((stages, rank, c.rows), dtype),
        out_s=plgpu.SMEM((c.columns, rank), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        collective_axes="wg",
    )
    def _(x_s, g_s, out_s, full, free):
        def load(slot, step):
            ms = pl.ds((split * steps + step) * c.rows, c.rows)
            plgpu.copy_gmem_to_smem(x_g.at[ms, pl.ds(column0, c.columns)], x_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(g_g.at[:, ms], g_s.at[slot], full.at[slot])

        def multiply(acc):
            def use(slot, step):
                if seed_g is not None:
                    mask_in_place(x_s.at[slot], seed_g, (split * steps + step) * c.rows, column0, threshold)
                plgpu.wgmma(acc, mosaic.transpose(x_s.at[slot]), mosaic.transpose(g_s.at[slot]))

            mosaic.drain(steps, stages, use, full, free)
            return acc[...]

        @pl.when(lax.axis_index("wg") == 1)
        def _():
            mosaic.fill(steps, stages, load, free)

        @pl.when(lax.axis_index("wg") == 0)
        def _():
            out = pl.run_scoped(multiply, plgpu.ACC((c.columns, rank), jnp.float32))
            if seed_g is not None:
                out *= 65536 / (65536 - threshold)
            out_s[...] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, out_g.at[split].at[pl.ds(column0, c.columns)])
            plgpu.wait_smem_to_gmem(0)
