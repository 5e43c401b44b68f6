"""An experiment, not shipped: `y = x·W + (x·A)·B` in one Hopper kernel, for ranks up to 16.

Letters and pipeline as in `lora_jax/kernels/mosaic_gemm.py`. A pass of its own over `x` costs 4 to 7 % of the product
at N = 4096. Here the first tiles compute `h = x·A` from what lies in shared memory anyway:

    The tiles of the first columns come first, as many columns as fill the chip once. The cluster of column `c` sums its
    share of `h` over the c-th part of K, each of its two CTAs for half of the rows, writes it as float32, and signals.
    The tails of these tiles wait for all shares of their rows, add them in order and round once; those of column 0
    write the result. Every other tile comes later and loads it like any operand, its block having waited once for all.

Nobody waits for a tile that comes later in the order than his own, so the grid makes progress whatever is resident.

Found on one H100 (docs/kernels.md, "What was tried"): right, and faster than two kernels for few rows; slower for many,
where the narrow products last longer. Pallas' interpreter has no semaphores, so that only a GPU can check it.
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

RANK = 16
MEMORY_REGISTERS = 40
A_SLOTS = 3
TILE_M, TILE_N, CLUSTER = 128, 128, 2  # of a warpgroup; two share a CTA's 256 rows, two CTAs lie side by side
STORE_N = 32


def gemm_with_thin(
    x: jax.Array,
    w: jax.Array,
    a_t: jax.Array,
    b: jax.Array,
    *,
    transposed: bool = False,
    tile: tuple[int, int] = (TILE_M, TILE_N),
    stages: int = 4,
    width: int = 8,
    sms: int = 132,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`x·w + (x·a_tᵀ)·b`: (M, K), (K, N) or (N, K), (16, K), (16, N) -> (M, N), and `h`, (M rounded up, 16)."""
    (m, k), n = x.shape, b.shape[1]
    tile_m, tile_n = tile
    rows, columns = pl.cdiv(m, 2 * tile_m), pl.cdiv(n, CLUSTER * tile_n)
    clusters = sms // CLUSTER
    first_columns = max(1, min(clusters // rows, columns, (k // K_TILE) // stages))
    body = functools.partial(
        _kernel, grid=(rows, columns, first_columns), transposed=transposed, tile=tile, stages=stages, width=width
    )
    y, h, _ = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((m, n), x.dtype),
            jax.ShapeDtypeStruct((rows * 2 * tile_m, RANK), x.dtype),
            jax.ShapeDtypeStruct((first_columns, rows * 2 * tile_m, RANK), jnp.float32),
        ],
        grid=(clusters,),
        grid_names=("blocks",),
        cluster=(CLUSTER,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        compiler_params=mosaic.compiler_params(),
        **mosaic.interpreted(interpret),
    )(x, w, a_t, b)
    return y, h


def _kernel(x_g, w_g, a_g, b_g, y_g, h_g, shares_g, *, grid, transposed, tile, stages, width):
    rows, columns, first_columns = grid
    tile_m, tile_n = tile
    cta_m, cta_n = 2 * tile_m, tile_n
    dtype = x_g.dtype
    steps = pl.cdiv(x_g.shape[1], K_TILE)
    smem = functools.partial(mosaic.shared, dtype=dtype)
    # Shares of a row block that are written, and (last) warpgroups' rows of `h`.
    written = pl.get_global(plgpu.SemaphoreType.REGULAR((rows + 1,)))

    @functools.partial(
        pl.run_scoped,
        x_s=smem((stages, cta_m, K_TILE)),
        w_s=smem((stages, cta_n, K_TILE) if transposed else (stages, K_TILE, cta_n)),
        a_s=smem((A_SLOTS, RANK, K_TILE)),
        thin_s=smem((cta_m, RANK), summed=RANK),
        tail_s=smem((RANK, cta_n), summed=RANK),
        y_s=smem((2, 2, 64, STORE_N)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        free=plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=2, num_barriers=stages),
        a_full=plgpu.Barrier(num_arrivals=1, num_barriers=A_SLOTS),
        a_free=plgpu.Barrier(num_arrivals=2, num_barriers=A_SLOTS),
        tail_full=plgpu.Barrier(num_arrivals=2),
        tail_free=plgpu.Barrier(num_arrivals=2),
        collective_axes="wg",
    )
    def _(x_s, w_s, a_s, thin_s, tail_s, y_s, full, free, a_full, a_free, tail_full, tail_free):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cluster")
        at, blocks = lax.axis_index("blocks"), lax.axis_size("blocks")
        firsts = rows * first_columns
        turns = lax.div(rows * columns - at + blocks - 1, blocks)
        first_turns = lax.max(lax.div(firsts - at + blocks - 1, blocks), 0)

        def first_tile(turn):
            """(row block, cluster column) of a tile that computes a share of `h`."""
            index = at + turn * blocks
            return lax.rem(index, rows), lax.div(index, rows)

        def later_tile(turn):
            index = at + turn * blocks - firsts
            mi, ni = plgpu.planar_snake(index, (rows, max(columns - first_columns, 1)), 0, width)
            return mi, ni + first_columns

        def share(column):
            """The steps over which the cluster of this column sums `h`."""
            return lax.div(column * steps, first_columns), lax.div((column + 1) * steps, first_columns)

        def a_steps_before(turn):
            """Steps of this block's earlier turns in which a share of `h` was computed."""
            # More than one such turn happens only where a single column is first: then each sums over all of K.
            if rows * first_columns <= blocks:
                lo, hi = share(first_tile(0)[1])
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
                    x_g.at[pl.ds(mi * cta_m, cta_m), ks], x_s.at[slot], full.at[slot], collective_axes="cluster"
                )
                ns = pl.ds((ni * CLUSTER + cta) * cta_n, cta_n)
                plgpu.copy_gmem_to_smem(w_g.at[ns, ks] if transposed else w_g.at[ks, ns], w_s.at[slot], full.at[slot])

            def load_tail(turn, ni):
                @pl.when(turn > 0)
                def _():
                    plgpu.barrier_wait(tail_free)

                plgpu.copy_gmem_to_smem(b_g.at[:, pl.ds((ni * CLUSTER + cta) * cta_n, cta_n)], tail_s, tail_full)

            @pl.loop(0, first_turns)
            def _(turn):
                mi, ni = first_tile(turn)
                lo, hi = share(ni)
                before = a_steps_before(turn)

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

                        plgpu.copy_gmem_to_smem(a_g.at[:, pl.ds(step * K_TILE, K_TILE)], a_s.at[slot], a_full.at[slot])

                load_tail(turn, ni)
                plgpu.barrier_arrive(tail_full)  # for `thin_s`, which the multiplying warpgroups fill themselves

            @pl.loop(first_turns, turns)
            def _(turn):
                mi, ni = later_tile(turn)

                @pl.loop(0, steps)
                def _(step):
                    load_step(turn, step, mi, ni)

                    @pl.when(step == stages)
                    def _():
                        load_tail(turn, ni)

                        @pl.when(turn == first_turns)
                        def _():
                            _wait_for(written.at[rows], 2 * rows)

                        plgpu.copy_gmem_to_smem(h_g.at[pl.ds(mi * cta_m, cta_m)], thin_s, tail_full)

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
            mine = pl.ds(wg * tile_m, tile_m)

            def multiply(acc, turn, step):
                slot = lax.rem(turn * steps + step, stages)
                plgpu.barrier_wait(full.at[slot])
                right = w_s.at[slot]
                plgpu.wgmma(acc, x_s.at[slot, mine], mosaic.transpose(right) if transposed else right)
                return slot

            def release(turn, step):
                @pl.when(step >= 1)
                def _():
                    plgpu.barrier_arrive(free.at[lax.rem(turn * steps + step - 1, stages)])

            def plain(acc, turn, first, last):
                @pl.loop(first, last)
                def _(step):
                    multiply(acc, turn, step)
                    plgpu.wgmma_wait(1)
                    release(turn, step)

            def add_shares(mi, ni):
                """Fills my rows of `thin_s`, and of `h` if this tile is the one to write them."""
                _wait_for(written.at[mi], 2 * CLUSTER * first_columns)
                for i in range(tile_m // 64):
                    ms = pl.ds(mi * cta_m + wg * tile_m + i * 64, 64)
                    total = _from_global(shares_g.at[0, ms])
                    for part in range(1, first_columns):
                        total += _from_global(shares_g.at[part, ms])
                    thin_s[pl.ds(wg * tile_m + i * 64, 64)] = total.astype(dtype)
                plgpu.commit_smem()

                @pl.when(jnp.logical_and(ni == 0, cta == 0))
                def _():
                    plgpu.copy_smem_to_gmem(thin_s.at[mine], h_g.at[pl.ds(mi * cta_m + wg * tile_m, tile_m)])
                    plgpu.wait_smem_to_gmem(0)
                    pl.semaphore_signal(written.at[rows])

            def finish(acc, turn):
                plgpu.barrier_wait(tail_full)
                plgpu.wgmma(acc, thin_s.at[mine], tail_s)
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(free.at[lax.rem(turn * steps + steps - 1, stages)])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(tail_free)
                return acc[...]

            def store(result, mi, ni):
                for i in range(tile_m // 64):
                    for number, j in enumerate(range(0, tile_n, STORE_N)):
                        slot = (i * (tile_n // STORE_N) + number) % 2
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        y_s[wg, slot] = result[i * 64 : (i + 1) * 64, j : j + STORE_N].astype(dtype)
                        plgpu.commit_smem()
                        ms = pl.ds(mi * cta_m + wg * tile_m + i * 64, 64)
                        ns = pl.ds((ni * CLUSTER + cta) * cta_n + j, STORE_N)
                        plgpu.copy_smem_to_gmem(y_s.at[wg, slot], y_g.at[ms, ns])

            @pl.loop(0, first_turns)
            def _(turn):
                mi, ni = first_tile(turn)
                lo, hi = share(ni)
                before = a_steps_before(turn)
                half = cta_m // 4  # rows of `h` for a warpgroup of either CTA

                def product(acc):
                    plain(acc, turn, 0, lo)
                    plgpu.wgmma_wait(0)

                    def thin(h_acc):
                        @pl.loop(lo, hi)
                        def _(step):
                            slot = multiply(acc, turn, step)
                            a_slot = lax.rem(before + step - lo, A_SLOTS)
                            plgpu.barrier_wait(a_full.at[a_slot])
                            left = x_s.at[slot, pl.ds(cta * (cta_m // 2) + wg * half, half)]
                            plgpu.wgmma(h_acc, left, mosaic.transpose(a_s.at[a_slot]))
                            # All of the last step is done; its operands' slots are free.
                            plgpu.wgmma_wait(2)
                            release(turn, step)

                            @pl.when(step > lo)
                            def _():
                                plgpu.barrier_arrive(a_free.at[lax.rem(before + step - lo - 1, A_SLOTS)])

                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(a_free.at[lax.rem(before + hi - lo - 1, A_SLOTS)])
                        return h_acc[...]

                    h = pl.run_scoped(thin, plgpu.WGMMAAccumulatorRef((half, RANK), jnp.float32))
                    shares_g.at[ni, pl.ds(mi * cta_m + cta * (cta_m // 2) + wg * half, half)][...] = h
                    pl.semaphore_signal(written.at[mi])
                    plain(acc, turn, hi, steps)
                    plgpu.wgmma_wait(0)
                    add_shares(mi, ni)
                    return finish(acc, turn)

                store(pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((tile_m, tile_n), jnp.float32)), mi, ni)

            @pl.loop(first_turns, turns)
            def _(turn):
                mi, ni = later_tile(turn)

                def product(acc):
                    plain(acc, turn, 0, steps)
                    return finish(acc, turn)

                store(pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((tile_m, tile_n), jnp.float32)), mi, ni)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _wait_for(semaphore: Any, value: int) -> None:
    """Waits until a semaphore counts `value`, and leaves it there."""
    pl.semaphore_wait(semaphore, value, decrement=False)


def _from_global(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
