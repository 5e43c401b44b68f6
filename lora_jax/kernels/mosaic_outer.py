"""Hopper: `dA = drop(x)ᵀ·g` and `dBᵀ = dyᵀ·h`, one pass over `x` and one over `dy`, summed over their rows.

Letters as in `mosaic_gemm`; `g` and `h` are thin, as `mosaic_down` gives them. Both in one kernel, because one alone
often has too few CTAs for the chip, and none to start while its last ones end.

A CTA owns `columns` columns of `x` or of `dy` and one of `splits` runs of rows. The float32 partial sums of the splits
are added in order afterwards: the result does not depend on which CTA came first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
from lora_jax.kernels.mosaic_dropout import mask_in_place, seeds


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
    pairs: Sequence[tuple[jax.Array, jax.Array]],
    config: OuterConfig,
    *,
    part: tuple[int, int] | None = None,
    seed: jax.Array | None = None,
    threshold: int = 0,
    apart: bool = False,
    interpret: Any = None,
) -> list[jax.Array]:
    """`drop(x)ᵀ·g` of each pair: (M, K), thin -> (K, R) float32. M and R are the same for all, K is not.

    `thin` is (R, M or more), or (M or more, R) for R in the ring. `seed` and `threshold` as in `mosaic_down.down`, for
    the first pair only. R is a multiple of 16, K of 64. Rows of `g` beyond M must be finite. `part`: (first, R) of the
    ranks of every `g`, if not all, as in `mosaic_gemm`. `apart`: each of the `splits` is a sum that is wanted for
    itself, (splits, K, R), of equally many rows.
    """
    c = config
    first_rank, rank = part or (0, rank_of(pairs[0][1]))
    blocks = [pl.cdiv(x.shape[1], c.columns) for x, _ in pairs]
    assert not apart or pairs[0][0].shape[0] % (c.splits * c.rows) == 0, (pairs[0][0].shape, c)
    operands = [operand for pair in pairs for operand in pair] + ([] if seed is None else [seed])

    def lora_outer(*refs):
        *inputs, out_g = refs
        seed_g = inputs.pop() if seed is not None else None
        firsts = [sum(blocks[:i]) for i in range(len(blocks))]
        each = list(zip(inputs[::2], inputs[1::2], firsts, strict=True))
        _kernel(each, seed_g, out_g, first_rank=first_rank, config=c, threshold=threshold)

    out = mosaic.kernel(
        lora_outer,
        out_type=jax.ShapeDtypeStruct((c.splits, sum(blocks) * c.columns, rank), jnp.float32),
        grid=(sum(blocks), c.splits),
        grid_names=("columns", "split"),
        num_threads=c.workers + 1,
        interpret=interpret,
    )(*operands)
    starts = [sum(blocks[:i]) * c.columns for i in range(len(blocks))]
    # Cut first: of one sum of all, XLA chooses a layout for one reader, and copies what the others read once more.
    found = [out[:, start : start + x.shape[1]] for start, (x, _) in zip(starts, pairs, strict=True)]
    return found if apart else [each.sum(0) if c.splits > 1 else each[0] for each in found]


def _kernel(
    pairs: list[tuple[Any, Any, int]], seed_g: Any, out_g: Any, *, first_rank: int, config: OuterConfig, threshold: int
):
    """`pairs`: references, and the first block of each."""
    c = config
    dtype, rank = pairs[0][0].dtype, out_g.shape[2]
    by_rank = not in_ring(rank)
    steps = pl.cdiv(pl.cdiv(pairs[0][0].shape[0], c.rows), c.splits)
    block, split = lax.axis_index("columns"), lax.axis_index("split")

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
        def load(x_g, g_g, first, slot, step):
            ms = pl.ds((split * steps + step) * c.rows, c.rows)
            columns, ranks = pl.ds((block - first) * c.columns, c.columns), pl.ds(first_rank, rank)
            plgpu.copy_gmem_to_smem(x_g.at[ms, columns], x_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(g_g.at[ranks, ms] if by_rank else g_g.at[ms, ranks], g_s.at[slot], full.at[slot])

        def multiply(masked, acc):
            seed = seeds(seed_g) if masked else None

            def use(slot, step):
                if masked:
                    row0 = (split * steps + step) * c.rows
                    mask_in_place(x_s.at[slot], seed, row0, block * c.columns, threshold)
                g = mosaic.transpose(g_s.at[slot]) if by_rank else g_s.at[slot]
                plgpu.wgmma(acc, mosaic.transpose(x_s.at[slot]), g)

            mosaic.drain(steps, c.stages, use, full, free, c.workers)
            return acc[...]

        def store(masked, out):
            out_s[...] = out * rescaling(threshold) if masked else out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, out_g.at[split].at[pl.ds(block * c.columns, c.columns)])
            plgpu.wait_smem_to_gmem(0)

        for number, (x_g, g_g, first) in enumerate(pairs):
            last = pairs[number + 1][2] if number + 1 < len(pairs) else None
            mine = True if len(pairs) == 1 else block >= first if last is None else (block >= first) & (block < last)
            masked = seed_g is not None and number == 0

            @pl.when(mine & (lax.axis_index("wg") == c.workers))
            def _(x_g=x_g, g_g=g_g, first=first):
                mosaic.fill(steps, c.stages, functools.partial(load, x_g, g_g, first), free)

            @pl.when(mine & (lax.axis_index("wg") < c.workers))
            def _(masked=masked):
                accumulator = plgpu.WGMMAAccumulatorRef((c.columns, rank), jnp.float32)
                own = pl.run_scoped(functools.partial(multiply, masked), accumulator)
                mosaic.summed(own, others_s, ready, functools.partial(store, masked), c.workers)
