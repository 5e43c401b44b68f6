"""Hopper: `y = x·W + (x·A)·B (+ bias)` in one kernel, for ranks up to 16: the thin product without a pass over `x`.

Letters, pipeline and clusters as in `mosaic_gemm`, of which this is the variant that computes its thin operand itself:

    The tiles of the first columns come first, as many columns as fill the chip once (`thin_schedule`). The cluster of
    column c sums its share of `h = x·A` over the c-th part of K from what lies in shared memory anyway, each of
    its two CTAs for half of the rows, writes it as float32, and signals. The tails of these tiles wait for all shares
    of their rows, add them in order and round once; those of column 0 write `h`. Every other tile comes later and
    loads `h` like any operand, its block having waited once for all of it.

The gradient of the input is the same kernel on other operands: `dx = dy·Wᵀ + mask·(g·Aᵀ)` with `g = dy·Bᵀ`, where
`transposed`, the mask over the tail. Dropout of the forward pass is not for this kernel: to mask `x` between two
products takes longer than a pass of its own.

The clusters wait for each other: all of them must be on the GPU at once, one CTA an SM, so `sms` must not be more than
it has. Sums are in a fixed order, so that the result is the same at each run.

Oracle: `lora_jax/reference.py`. Checked by: `tests/kernels/test_mosaic_adapted.py`, with one cluster for all tiles; on
a GPU, where each has a few, by `test_gpu_kernels.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lora_jax.kernels import mosaic
from lora_jax.kernels.gemm_config import K_TILE
from lora_jax.kernels.mosaic_store import bias_pieces, padded_bias, store_tile
from lora_jax.kernels.thin_schedule import ThinSchedule

RANK = 16
MEMORY_REGISTERS = 24
A_SLOTS = 3
# Of a warpgroup. Two share a CTA's rows, two CTAs lie side by side, and share the loads of `x`.
TILE_M, TILE_N, CLUSTER = 128, 128, 2
CTA_M = 2 * TILE_M
STORE_N, STORE_SLOTS = 32, 2
STAGES = 4
WIDTH = 8  # tiles before the order turns


def adapted(
    x: jax.Array,
    w: jax.Array,
    a_t: jax.Array,
    b: jax.Array,
    *,
    transposed: bool = False,
    bias: jax.Array | None = None,
    seed: jax.Array | None = None,
    threshold: int = 0,
    sms: int = 132,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`x·w + (x·a_tᵀ)·b` and `h`: (M, K), (K, N) or (N, K), (16, K), (16, N) -> (M, N), (16, M rounded up to 256).

    bfloat16 or float16, sums in float32, `h` and `y` rounded once. `bias`: (N,), of `x`'s dtype or float32, added
    before. With a `seed` (see `mosaic_dropout.Mask`), `h·b` is masked and rescaled; `h` is not.

    With a third axis before the others, `a_t` and `b` are one for each of as many runs of equally many rows, a multiple
    of 128.
    """
    (m, k), n = x.shape, b.shape[-1]
    run = None if b.ndim == 2 else m // b.shape[0]
    assert run is None or (m % run == 0 and run % TILE_M == 0), (x.shape, b.shape)
    columns = CLUSTER * TILE_N
    schedule = ThinSchedule(
        rows=pl.cdiv(m, CTA_M), columns=pl.cdiv(n, columns), steps=pl.cdiv(k, K_TILE),
        clusters=sms // CLUSTER, stages=STAGES,
    )  # fmt: skip
    height = schedule.rows * CTA_M
    given = {"bias_g": padded_bias(bias, columns), "seed_g": seed}
    given = {name: operand for name, operand in given.items() if operand is not None}

    def lora_adapted(x_g, w_g, a_g, b_g, *rest):
        _kernel(
            x_g, w_g, a_g, b_g, *rest[-3:], **dict(zip(given, rest, strict=False)),
            schedule=schedule, transposed=transposed, threshold=threshold, run=run,
        )  # fmt: skip

    y, h, _ = mosaic.kernel(
        lora_adapted,
        out_type=[
            jax.ShapeDtypeStruct((m, n), x.dtype),
            jax.ShapeDtypeStruct((RANK, height), x.dtype),
            jax.ShapeDtypeStruct((schedule.first_columns, height, RANK), jnp.float32),
        ],
        grid=(sms // CLUSTER,),
        grid_names=("blocks",),
        cluster=(CLUSTER,),
        cluster_names=("cluster",),
        num_threads=3,
        interpret=interpret,
    )(x, w, a_t, b, *given.values())
    return y, h


def _kernel(
    x_g, w_g, a_g, b_g, y_g, h_g, shares_g, *, bias_g: Any = None, seed_g: Any = None,
    schedule: ThinSchedule, transposed: bool, threshold: int, run: int | None,
):  # fmt: skip
    dtype, steps, rows, stages = x_g.dtype, schedule.steps, schedule.rows, STAGES
    smem = functools.partial(mosaic.shared, dtype=dtype)
    tails = 1 if run is None or run % CTA_M == 0 else 2  # else each warpgroup's rows have one of their own

    def of_run(factors_g, row):
        """Those of a row; of the last run for rows beyond all, which come to nothing."""
        return factors_g if run is None else factors_g.at[lax.min(lax.div(row, run), factors_g.shape[0] - 1)]

    # Of each row block, how many shares are written; last, how many warpgroups' rows of `h`.
    written = pl.get_global(plgpu.SemaphoreType.REGULAR((rows + 1,)))

    @functools.partial(
        pl.run_scoped,
        x_s=smem((stages, CTA_M, K_TILE)),
        w_s=smem((stages, TILE_N, K_TILE) if transposed else (stages, K_TILE, TILE_N)),
        a_s=smem((A_SLOTS, RANK, K_TILE)),
        thin_s=smem((2, RANK, TILE_M), summed=RANK),  # of each warpgroup's rows
        tail_s=smem((tails, RANK, TILE_N), summed=RANK),
        # A second tail takes a store slot's place.
        y_s=smem((2, STORE_SLOTS - (tails - 1), 64, STORE_N)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        free=plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=2, num_barriers=stages),
        a_full=plgpu.Barrier(num_arrivals=1, num_barriers=A_SLOTS),
        a_free=plgpu.Barrier(num_arrivals=2, num_barriers=A_SLOTS),
        tail_full=plgpu.Barrier(num_arrivals=2 + tails),
        tail_free=plgpu.Barrier(num_arrivals=2),
        collective_axes="wg",
    )
    def _(x_s, w_s, a_s, thin_s, tail_s, y_s, full, free, a_full, a_free, tail_full, tail_free):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cluster")
        at, blocks = lax.axis_index("blocks"), lax.axis_size("blocks")
        turns = lax.div(schedule.tiles - at + blocks - 1, blocks)
        first_turns = lax.max(lax.div(schedule.firsts - at + blocks - 1, blocks), 0)

        def first_tile(turn):
            index = at + turn * blocks
            return lax.rem(index, rows), lax.div(index, rows)

        def later_tile(turn):
            left = max(schedule.columns - schedule.first_columns, 1)
            mi, ni = plgpu.planar_snake(at + turn * blocks - schedule.firsts, (rows, left), 0, WIDTH)
            return mi, ni + schedule.first_columns

        def a_steps_before(turn):
            """Steps of this block's earlier turns in which it summed a share of `h`."""
            if schedule.one_first_each:
                lo, hi = schedule.share(first_tile(0)[1])
                return jnp.where(jnp.logical_and(turn > 0, first_turns > 0), hi - lo, 0)
            return turn * steps

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def load_step(turn, step, mi, ni):
                count = turn * steps + step
                slot = lax.rem(count, stages)

                @pl.when(count >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                ks = pl.ds(step * K_TILE, K_TILE)
                plgpu.copy_gmem_to_smem(
                    x_g.at[pl.ds(mi * CTA_M, CTA_M), ks], x_s.at[slot], full.at[slot], collective_axes="cluster"
                )
                ns = pl.ds((ni * CLUSTER + cta) * TILE_N, TILE_N)
                plgpu.copy_gmem_to_smem(w_g.at[ns, ks] if transposed else w_g.at[ks, ns], w_s.at[slot], full.at[slot])

            def load_tail(turn, mi, ni, *, with_h):
                @pl.when(turn > 0)
                def _():
                    plgpu.barrier_wait(tail_free)

                ns = pl.ds((ni * CLUSTER + cta) * TILE_N, TILE_N)
                for half in range(tails):
                    mine_g = of_run(b_g, mi * CTA_M + half * TILE_M)
                    plgpu.copy_gmem_to_smem(mine_g.at[:, ns], tail_s.at[half], tail_full)
                for half in range(2):
                    if with_h:
                        ms = pl.ds(mi * CTA_M + half * TILE_M, TILE_M)
                        plgpu.copy_gmem_to_smem(h_g.at[:, ms], thin_s.at[half], tail_full)
                    else:
                        plgpu.barrier_arrive(tail_full)

            @pl.loop(0, first_turns)
            def _(turn):
                mi, ni = first_tile(turn)
                lo, hi = schedule.share(ni)
                before = a_steps_before(turn)
                load_tail(turn, mi, ni, with_h=False)

                @pl.loop(0, steps)
                def _(step):
                    load_step(turn, step, mi, ni)

                    @pl.when(jnp.logical_and(step >= lo, step < hi))
                    def _():
                        count = before + step - lo
                        slot = lax.rem(count, A_SLOTS)

                        @pl.when(count >= A_SLOTS)
                        def _():
                            plgpu.barrier_wait(a_free.at[slot])

                        mine_g = of_run(a_g, mi * CTA_M + cta * (CTA_M // 2))
                        plgpu.copy_gmem_to_smem(
                            mine_g.at[:, pl.ds(step * K_TILE, K_TILE)], a_s.at[slot], a_full.at[slot]
                        )

            @pl.loop(first_turns, turns)
            def _(turn):
                mi, ni = later_tile(turn)

                @pl.loop(0, steps)
                def _(step):
                    load_step(turn, step, mi, ni)

                    # By now the last tile's tail was used: its products came before those of this ring's slots.
                    @pl.when(step == stages)
                    def _():
                        @pl.when(turn == first_turns)
                        def _():
                            _wait_for(written.at[rows], 2 * rows)

                        load_tail(turn, mi, ni, with_h=True)

            # Every phase of a barrier has to be seen before the barrier goes.
            @pl.when(turns > 0)
            def _():
                @pl.loop(turns * steps - stages, turns * steps)
                def _(count):
                    plgpu.barrier_wait(free.at[lax.rem(count, stages)])

                plgpu.barrier_wait(tail_free)

            a_steps = a_steps_before(first_turns)

            @pl.loop(lax.max(a_steps - A_SLOTS, 0), a_steps)
            def _(count):
                plgpu.barrier_wait(a_free.at[lax.rem(count, A_SLOTS)])

        @pl.when(wg < 2)
        def _multiply():
            plgpu.set_max_registers(mosaic.registers_left(MEMORY_REGISTERS, 2), action="increase")
            my_rows = pl.ds(wg * TILE_M, TILE_M)
            half = CTA_M // 4  # rows of `h` for a warpgroup of either CTA
            half_row = cta * (CTA_M // 2) + wg * half
            my_tail = tail_s.at[wg if tails == 2 else 0]

            def multiply(acc, turn, step):
                slot = lax.rem(turn * steps + step, stages)
                plgpu.barrier_wait(full.at[slot])
                right = w_s.at[slot]
                plgpu.wgmma(acc, x_s.at[slot, my_rows], mosaic.transpose(right) if transposed else right)
                return slot

            def release(turn, step):
                """Gives back the slot of the step before."""

                @pl.when(step >= 1)
                def _():
                    plgpu.barrier_arrive(free.at[lax.rem(turn * steps + step - 1, stages)])

            def plain(acc, turn, first, last, drained=True):
                @pl.loop(first, last)
                def _(step):
                    multiply(acc, turn, step)
                    plgpu.wgmma_wait(1)
                    release(turn, step)

                # An accumulator that is set while another is in flight would make the assembler wait after every
                # single product.
                if drained:
                    plgpu.wgmma_wait(0)

            def thin(acc, turn, lo, hi):
                """The steps in which my share of `h` is summed as well."""
                before = a_steps_before(turn)

                def sum_up(h_acc):
                    @pl.loop(lo, hi)
                    def _(step):
                        slot = multiply(acc, turn, step)
                        a_slot = lax.rem(before + step - lo, A_SLOTS)
                        plgpu.barrier_wait(a_full.at[a_slot])
                        plgpu.wgmma(h_acc, x_s.at[slot, pl.ds(half_row, half)], mosaic.transpose(a_s.at[a_slot]))
                        # All of the last step is done; its operands' slots are free.
                        plgpu.wgmma_wait(2)
                        release(turn, step)

                        @pl.when(step > lo)
                        def _():
                            plgpu.barrier_arrive(a_free.at[lax.rem(before + step - lo - 1, A_SLOTS)])

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(a_free.at[lax.rem(before + hi - lo - 1, A_SLOTS)])
                    return h_acc[...]

                return pl.run_scoped(sum_up, plgpu.WGMMAAccumulatorRef((half, RANK), jnp.float32))

            def add_shares(mi, ni):
                """Fills my rows of `thin_s`, and of `h` if this tile is the one to write them."""
                _wait_for(written.at[mi], 2 * CLUSTER * schedule.first_columns)
                for i in range(TILE_M // 64):
                    ms = pl.ds(mi * CTA_M + wg * TILE_M + i * 64, 64)
                    total = mosaic.load_global(shares_g.at[0, ms])
                    for part in range(1, schedule.first_columns):
                        total += mosaic.load_global(shares_g.at[part, ms])
                    mosaic.transpose(thin_s.at[wg, :, pl.ds(i * 64, 64)])[...] = total.astype(dtype)
                plgpu.commit_smem()

                @pl.when(jnp.logical_and(ni == 0, cta == 0))
                def _():
                    ms = pl.ds(mi * CTA_M + wg * TILE_M, TILE_M)
                    plgpu.copy_smem_to_gmem(thin_s.at[wg], h_g.at[:, ms])
                    plgpu.wait_smem_to_gmem(0)
                    pl.semaphore_signal(written.at[rows])

            def finish(acc, turn):
                """The last step's slot, and the tail, unless it comes masked with the stores."""
                if seed_g is None:
                    plgpu.wgmma(acc, mosaic.transpose(thin_s.at[wg]), my_tail)
                plgpu.wgmma_wait(0)
                if seed_g is None:
                    plgpu.barrier_arrive(tail_free)
                plgpu.barrier_arrive(free.at[lax.rem(turn * steps + steps - 1, stages)])
                return acc[...]

            def low_rank(i, j):
                def product(acc):
                    left = mosaic.transpose(thin_s.at[wg, :, pl.ds(i, 64)])
                    plgpu.wgmma(acc, left, my_tail.at[:, pl.ds(j, STORE_N)])
                    plgpu.wgmma_wait(0)
                    return acc[...]

                return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((64, STORE_N), jnp.float32))

            def tile(product, mi, ni):
                column0 = (ni * CLUSTER + cta) * TILE_N
                bias = bias_pieces(bias_g, column0, TILE_N, STORE_N)
                result = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE_M, TILE_N), jnp.float32))
                store_tile(
                    result, y_g, y_s.at[wg], mi * CTA_M + wg * TILE_M, column0,
                    bias=bias, seed_g=seed_g, threshold=threshold, low_rank=low_rank,
                )  # fmt: skip
                if seed_g is not None:
                    plgpu.barrier_arrive(tail_free)

            @pl.loop(0, first_turns)
            def _(turn):
                mi, ni = first_tile(turn)
                lo, hi = schedule.share(ni)

                def product(acc):
                    plain(acc, turn, 0, lo)
                    plgpu.barrier_wait(tail_full)
                    h = thin(acc, turn, lo, hi)
                    shares_g.at[ni, pl.ds(mi * CTA_M + half_row, half)][...] = h
                    pl.semaphore_signal(written.at[mi])
                    plain(acc, turn, hi, steps)
                    add_shares(mi, ni)
                    return finish(acc, turn)

                tile(product, mi, ni)

            @pl.loop(first_turns, turns)
            def _(turn):
                mi, ni = later_tile(turn)

                def product(acc):
                    plain(acc, turn, 0, steps, drained=False)
                    plgpu.barrier_wait(tail_full)
                    return finish(acc, turn)

                tile(product, mi, ni)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _wait_for(semaphore: Any, value: int) -> None:
    """Waits until a semaphore counts `value`, and leaves it there."""
    pl.semaphore_wait(semaphore, value, decrement=False)
