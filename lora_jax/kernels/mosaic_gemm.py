"""Hopper: `y = x·W + thinᵀ·tail`, a matrix product with a low-rank tail, in one store of `y`.

Letters, the same in every kernel file:
    M rows (tokens)    K contracted features    N output features    R rank, padded to a multiple of 16

The forward pass is `x·W + h·B` (thin = hᵀ, tail = B), the gradient of the input `dy·Wᵀ + g·Aᵀ` (thin = gᵀ,
tail = Aᵀ, `transposed`): thin operands always lie rank-major, (R, M) and (R, N), so that both directions share a tile.

A persistent grid of one CTA an SM (or clusters of two, which share the loads of one operand by multicast). In each, one
warpgroup issues bulk copies into a ring of `stages` slots, two others multiply. The ring runs on across output tiles:
the next tile is loaded while this one is stored. The tail's operands have shared memory of their own and arrive
during the main loop, so that it costs R/K of the product and no second pass over `y`.

Oracle: `lora_jax/reference.py`. Checked by: `tests/kernels/test_mosaic_gemm.py`.
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

K_TILE = 64  # elements: 128 bytes, the widest swizzle
MEMORY_REGISTERS = 40


@dataclass(frozen=True)
class GemmConfig:
    """How the output is cut into tiles, and who works on which."""

    tile_m: int = 128  # of one of the two multiplying warpgroups
    tile_n: int = 128
    stages: int = 4
    # "m" or "n": the two multiplying warpgroups share a tile, side by side in this direction. "": they take turns,
    # each with a tile of its own, so that one multiplies while the other stores.
    split: str = "n"
    cluster: str = ""  # direction in which two CTAs lie and share the other operand; "" for none
    minor: str = "m"  # direction that the tile order runs along first
    width: int = 8  # tiles before it turns
    store_n: int = 32  # columns stored at a time
    delay: int = 1  # products left in flight
    tail_rank: int = 0  # rank of the tail that is loaded at a time; 0: all of it

    @property
    def cta(self) -> tuple[int, int]:
        return self.tile_m * (1 + (self.split == "m")), self.tile_n * (1 + (self.split == "n"))

    @property
    def block(self) -> tuple[int, int]:
        """Output of one cluster."""
        m, n = self.cta
        return m * (1 + (self.cluster == "m")), n * (1 + (self.cluster == "n"))

    @property
    def takes_turns(self) -> bool:
        return self.split == ""

    def shared_bytes(self, rank: int) -> int:
        m, n = self.cta
        ring = (m + n) * K_TILE * self.stages
        store = 2 * self._slots * 64 * self.store_n
        return 2 * (ring + store + (m + n) * min(rank, self.tail_rank or rank))

    @property
    def _slots(self) -> int:
        return min(2, self.tile_m * self.tile_n // (64 * self.store_n))


def gemm(
    x: jax.Array,
    w: jax.Array,
    thin: jax.Array | None,
    tail: jax.Array | None,
    config: GemmConfig,
    *,
    transposed: bool = False,
    sms: int = 132,
    interpret: Any = None,
) -> jax.Array:
    """`x·w + thinᵀ·tail`: (M, K), (K, N), (R, M), (R, N) -> (M, N), or `x·wᵀ` for a `w` of (N, K).

    bfloat16 or float16 throughout, sums in float32, rounded once. Any M; K and N multiples of 8 (the copy engine
    steps by 16 bytes). **Raises:** `ValueError` for shapes or a configuration the kernel can't take.
    """
    (m, k), n = x.shape, w.shape[0] if transposed else w.shape[1]
    rank = 0 if thin is None else thin.shape[0]
    problem = unsupported(m, k, n, rank, config)
    if problem:
        raise ValueError(problem)
    kernel = functools.partial(_kernel, config=config, transposed=transposed)
    run = plgpu.kernel(
        kernel if rank else functools.partial(_without_tail, kernel),
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(sms // 2 if config.cluster else sms,),
        grid_names=("blocks",),
        cluster=(2,) if config.cluster else (1,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        compiler_params=mosaic.compiler_params(),
        **mosaic.interpreted(interpret),
    )
    return run(x, w, thin, tail) if rank else run(x, w)


def unsupported(m: int, k: int, n: int, rank: int, config: GemmConfig) -> str | None:
    """Why the kernel can't run, or None."""
    if k % 8 or n % 8:
        return f"K={k} and N={n} must be multiples of 8"
    if rank % 16 or (rank and rank % min(rank, config.tail_rank or rank)):
        return f"R={rank} must be a multiple of 16 and of the tail's {config.tail_rank}"
    if config.shared_bytes(rank) > mosaic.SHARED_BYTES:
        return f"{config} needs {config.shared_bytes(rank)} bytes of shared memory, more than {mosaic.SHARED_BYTES}"
    if -(-k // K_TILE) <= config.stages:
        return f"K={k} is shorter than the ring of {config.stages} stages of {K_TILE}"
    return None


def _without_tail(kernel, x_g, w_g, y_g, **options):
    return kernel(x_g, w_g, None, None, y_g, **options)


def _kernel(x_g, w_g, thin_g, tail_g, y_g, *, config: GemmConfig, transposed: bool):
    c = config
    dtype = x_g.dtype
    (m, k), n = x_g.shape, y_g.shape[1]
    rank = thin_g.shape[0] if thin_g is not None else 0
    part = min(rank, c.tail_rank or rank)
    parts = rank // part if rank else 0
    cta_m, cta_n = c.cta
    tiles = pl.cdiv(m, c.block[0]), pl.cdiv(n, c.block[1])
    steps = pl.cdiv(k, K_TILE)
    slots = c._slots
    # A warpgroup must wait for every phase of a barrier that it waits for at all: each team has barriers of its own.
    teams = 2 if c.takes_turns else 1
    smem = functools.partial(mosaic.shared, dtype=dtype)
    # The two halves of a part of `W` or of the tail lie apart: a warpgroup's operand must be contiguous.
    halves = (2, cta_n // 2) if c.split == "n" else (1, cta_n)

    scratch = {
        "x_s": smem((c.stages, cta_m, K_TILE)),
        "w_s": smem((c.stages, cta_n, K_TILE)) if transposed else smem((c.stages, halves[0], K_TILE, halves[1])),
        "y_s": smem((2, slots, 64, c.store_n)),
        "full": plgpu.Barrier(num_arrivals=1 + (1 if transposed else halves[0]), num_barriers=teams * c.stages),
        "free": _free_barrier(c),
    }
    if rank:
        scratch |= {
            "thin_s": smem((part, cta_m), summed=part),
            "tail_s": smem((halves[0], part, halves[1]), summed=part),
            "tail_full": plgpu.Barrier(num_arrivals=1 + halves[0], num_barriers=teams),
            "tail_free": plgpu.Barrier(num_arrivals=1 if c.takes_turns else 2),
        }

    @functools.partial(pl.run_scoped, collective_axes="wg", **scratch)
    def _(x_s, w_s, y_s, full, free, thin_s=None, tail_s=None, tail_full=None, tail_free=None):
        wg = lax.axis_index("wg")
        turns = _turns(tiles)

        def tile_of(turn):
            """Origin of the output tile that this CTA works on in its `turn`."""
            at = lax.axis_index("blocks") + turn * lax.axis_size("blocks")
            mi, ni = plgpu.planar_snake(at, tiles, "mn".index(c.minor), c.width)
            if c.cluster:
                cta = lax.axis_index("cluster")
                mi, ni = (mi * 2 + cta, ni) if c.cluster == "m" else (mi, ni * 2 + cta)
            return mi * cta_m, ni * cta_n

        def multicast(side):
            return {"collective_axes": "cluster"} if c.cluster == side else {}

        def load_step(slot, team, step, m0, n0):
            ks, done = pl.ds(step * K_TILE, K_TILE), full.at[team * c.stages + slot]
            plgpu.copy_gmem_to_smem(x_g.at[pl.ds(m0, cta_m), ks], x_s.at[slot], done, **multicast("n"))
            if transposed:
                plgpu.copy_gmem_to_smem(w_g.at[pl.ds(n0, cta_n), ks], w_s.at[slot], done, **multicast("m"))
                return
            for half in range(halves[0]):
                ns = pl.ds(n0 + half * halves[1], halves[1])
                plgpu.copy_gmem_to_smem(w_g.at[ks, ns], w_s.at[slot, half], done, **multicast("m"))

        def load_tail(p, team, m0, n0):
            rs, done = pl.ds(p * part, part), tail_full.at[team]
            plgpu.copy_gmem_to_smem(thin_g.at[rs, pl.ds(m0, cta_m)], thin_s, done)
            for half in range(halves[0]):
                ns = pl.ds(n0 + half * halves[1], halves[1])
                plgpu.copy_gmem_to_smem(tail_g.at[rs, ns], tail_s.at[half], done)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            @pl.loop(0, turns)
            def _(turn):
                m0, n0 = tile_of(turn)
                team = lax.rem(turn, teams)

                @pl.loop(0, steps)
                def _(step):
                    count = turn * steps + step
                    slot = lax.rem(count, c.stages)

                    @pl.when(count >= c.stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    load_step(slot, team, step, m0, n0)
                    if rank:
                        # By now the last tile's tail was used: its products came before those of this ring's slots.
                        @pl.when(step == c.stages)
                        def _():
                            @pl.when(turn > 0)
                            def _():
                                plgpu.barrier_wait(tail_free)

                            load_tail(0, team, m0, n0)

                for p in range(1, parts):
                    plgpu.barrier_wait(tail_free)
                    load_tail(p, team, m0, n0)

            # Every phase of a barrier has to be seen before the barrier goes.
            @pl.when(turns > 0)
            def _():
                @pl.loop(turns * steps - c.stages, turns * steps)
                def _(count):
                    plgpu.barrier_wait(free.at[lax.rem(count, c.stages)])

                if rank:
                    plgpu.barrier_wait(tail_free)

        @pl.when(wg < 2)
        def _multiply():
            plgpu.set_max_registers(mosaic.registers_left(MEMORY_REGISTERS, 2), action="increase")
            team = wg if c.takes_turns else 0
            my_m = pl.ds(wg * c.tile_m, c.tile_m) if c.split == "m" else slice(None)

            def lhs(ref):
                return ref.at[my_m] if c.split == "m" else ref

            def rhs(slot):
                if transposed:
                    ref = w_s.at[slot]
                    return mosaic.transpose(ref.at[pl.ds(wg * c.tile_n, c.tile_n)] if c.split == "n" else ref)
                return w_s.at[slot, wg] if c.split == "n" else w_s.at[slot, 0]

            @pl.loop(wg if c.takes_turns else 0, turns, step=2 if c.takes_turns else 1)
            def _(turn):
                m0, n0 = tile_of(turn)
                first = turn * steps

                def product(acc):
                    @pl.loop(0, steps)
                    def _(step):
                        slot = lax.rem(first + step, c.stages)
                        plgpu.barrier_wait(full.at[team * c.stages + slot])
                        plgpu.wgmma(acc, lhs(x_s.at[slot]), rhs(slot))
                        plgpu.wgmma_wait(c.delay)

                        @pl.when(step >= c.delay)
                        def _():
                            plgpu.barrier_arrive(free.at[lax.rem(first + step - c.delay, c.stages)])

                    if c.delay and not rank:
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[lax.rem(first + steps - 1, c.stages)])
                    for p in range(parts):
                        plgpu.barrier_wait(tail_full.at[team])
                        left = thin_s.at[:, my_m] if c.split == "m" else thin_s
                        plgpu.wgmma(acc, mosaic.transpose(left), tail_s.at[wg if c.split == "n" else 0])
                        if c.delay and p == 0:
                            plgpu.wgmma_wait(1)
                            plgpu.barrier_arrive(free.at[lax.rem(first + steps - 1, c.stages)])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(tail_free)
                    return acc[...]

                result = pl.run_scoped(product, plgpu.ACC((c.tile_m, c.tile_n), jnp.float32)).astype(dtype)
                wm, wn = wg * c.tile_m * (c.split == "m"), wg * c.tile_n * (c.split == "n")
                for i in range(c.tile_m // 64):
                    for j in range(c.tile_n // c.store_n):
                        slot = (i * (c.tile_n // c.store_n) + j) % slots
                        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                        y_s[wg, slot] = result[i * 64 : (i + 1) * 64, j * c.store_n : (j + 1) * c.store_n]
                        plgpu.commit_smem()
                        rows = pl.ds(m0 + wm + i * 64, 64)
                        columns = pl.ds(n0 + wn + j * c.store_n, c.store_n)
                        plgpu.copy_smem_to_gmem(y_s.at[wg, slot], y_g.at[rows, columns])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _free_barrier(c: GemmConfig) -> Any:
    arrivals = 1 if c.takes_turns else 2
    if c.cluster:
        return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=arrivals, num_barriers=c.stages)
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=c.stages)


def _turns(tiles: tuple[int, int]) -> jax.Array:
    """How many output tiles this block of the grid works on."""
    at, blocks = lax.axis_index("blocks"), lax.axis_size("blocks")
    return lax.div(tiles[0] * tiles[1] - at + blocks - 1, blocks)
