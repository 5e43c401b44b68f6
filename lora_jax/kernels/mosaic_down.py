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
from lora_jax.kernels.mosaic_dropout import mask_in_place, seeds


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
    x: jax.Array | tuple[jax.Array, ...],
    a_t: jax.Array | tuple[jax.Array, ...],
    config: DownConfig,
    *,
    by_rank: bool | None = None,
    seed: jax.Array | None = None,
    threshold: int = 0,
    interpret: Any = None,
) -> jax.Array:
    """`drop(x)·a_tᵀ`: (M, K), (R, K) -> thin (R, M rounded up to the tile), or (M rounded up, R) for R in the ring.

    Of `x`'s dtype, summed in float32. With a `seed` (see `mosaic_dropout.Mask`), elements whose 16 bits lie under
    `threshold` are dropped and the sums are multiplied by 65536 / (65536 - threshold), in float32. Rows beyond M are
    zero. R is a multiple of 16, K of 64.

    Several `x` and as many `a_t` are taken for one of each, side by side: the sum of their products. `by_rank`: the
    result's layout, if R alone does not decide it.

    `a_t` may have a third axis before the others: one for each of as many runs of equally many rows, a multiple of
    those of `config`.
    """
    c = config
    xs: Any = x if isinstance(x, tuple) else (x,)
    factors: Any = a_t if isinstance(a_t, tuple) else (a_t,)
    counts = [pl.cdiv(x.shape[1], c.depth) for x in xs]
    if len(xs) > 1:  # each begins at a step of the walk
        assert seed is None, "a mask has one place for its columns"
        factors = [jnp.pad(a, ((0, 0), (0, n * c.depth - a.shape[1]))) for a, n in zip(factors, counts, strict=True)]
    factor = factors[0] if len(xs) == 1 else jnp.concatenate(factors, 1)
    rank, rows = factor.shape[-2], xs[0].shape[0]
    run = None if factor.ndim == 2 else rows // factor.shape[0]
    assert run is None or (run % c.rows == 0 and len(xs) == 1), (factor.shape, rows, c)
    rank_first = not in_ring(rank) if by_rank is None else by_rank
    blocks = pl.cdiv(rows, c.rows)
    by_rank = rank_first and c.splits == 1 and mosaic.STORES_TRANSPOSED
    shape = (rank, blocks * c.rows) if by_rank else (blocks * c.rows, rank)
    dtype = factor.dtype
    if c.splits > 1:
        shape, dtype = (c.splits, *shape), jnp.float32
    operands = [*xs, factor, *([] if seed is None else [seed])]

    def lora_down(*refs):
        xs_g, (a_g, *rest) = refs[: len(xs)], refs[len(xs) :]
        seed_g = rest[0] if seed is not None else None
        _kernel(xs_g, counts, a_g, seed_g, rest[-1], run=run, config=c, by_rank=by_rank, threshold=threshold)

    out = mosaic.kernel(
        lora_down,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(blocks, c.splits),
        grid_names=("rows", "split"),
        num_threads=c.workers + 1,
        interpret=interpret,
    )(*operands)
    if c.splits > 1:
        out = out.sum(0).astype(factor.dtype)
    return out.T if rank_first and not by_rank else out


def _kernel(
    xs_g, counts, a_g, seed_g, h_g, *, run: int | None, config: DownConfig, by_rank: bool, threshold: int
):  # fmt: skip
    c = config
    dtype, rank = a_g.dtype, a_g.shape[-2]
    steps = pl.cdiv(sum(counts), c.splits)
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
            def copy(i, at):
                ks = pl.ds(at * c.depth, c.depth)
                plgpu.copy_gmem_to_smem(xs_g[i].at[pl.ds(row0, c.rows), ks], x_s.at[slot], full.at[slot])

            at = split * steps + step
            mosaic.side_by_side(at, counts, copy)
            mine_g = a_g if run is None else a_g.at[lax.div(row0, run)]
            plgpu.copy_gmem_to_smem(mine_g.at[:, pl.ds(at * c.depth, c.depth)], a_s.at[slot], full.at[slot])

        def multiply(acc):
            seed = None if seed_g is None else seeds(seed_g)

            def use(slot, step):
                if seed is not None:
                    mask_in_place(x_s.at[slot], seed, row0, (split * steps + step) * c.depth, threshold)
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
