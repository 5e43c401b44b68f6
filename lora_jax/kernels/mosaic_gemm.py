"""Hopper: `y = x·W + thin·tail (+ bias)`, a matrix product with a low-rank tail, in one store of `y`.

Letters, the same in every kernel file:
    M rows (tokens)    K contracted features    N output features    R rank, padded to 16 or a multiple of 64

The forward pass is `x·W + h·B` (thin = h, tail = B), the gradient of the input `dy·Wᵀ + g·Aᵀ` (thin = g, tail = Aᵀ,
`transposed`), there with the dropout mask over `g·Aᵀ`.

A persistent grid of one CTA an SM (or clusters of two, which share the loads of one operand by multicast). In each, one
warpgroup issues bulk copies into a ring of `stages` slots, two others multiply. The ring runs on across output tiles:
the next tile is loaded while this one is stored. The tail is a few more steps of the same ring where R is a multiple
of 64, as deep as a step. A thinner one has shared memory of its own, filled during the main loop; it comes rank-major
(`thin` as (R, M), `tail` as (R, N)), so that its rows are long enough to copy. Either costs R/K of the product and no
second pass over `y`.

Oracle: `lora_jax/reference.py`. Checked by: `tests/kernels/test_mosaic_interpret.py`.
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
from lora_jax.kernels.gemm_config import K_TILE, GemmConfig, in_ring, rank_of, unsupported
from lora_jax.kernels.mosaic_store import bias_pieces, padded_bias, store_tile

MEMORY_REGISTERS = 40


def gemm(
    x: jax.Array | tuple[jax.Array, ...],
    w: jax.Array | tuple[jax.Array, ...],
    thin: jax.Array | None,
    tail: jax.Array | None,
    config: GemmConfig,
    *,
    transposed: bool = False,
    part: tuple[int, int] | None = None,
    bias: jax.Array | None = None,
    seed: jax.Array | None = None,
    threshold: int = 0,
    sms: int = 132,
    interpret: Any = None,
) -> jax.Array:
    """`x·w + thin·tail`: (M, K), (K, N), thin, tail -> (M, N), or `x·wᵀ` for a `w` of (N, K).

    `thin` and `tail` are (M, R) and (R, N), or (N, R) if `transposed`, for R a multiple of 64, else (R, M or more) and
    (R, N). bfloat16 or float16 throughout, sums in float32, rounded once. With a `seed` (see `mosaic_dropout.Mask`),
    `thin·tail` is masked and rescaled. `bias`: (N,), of `x`'s dtype or float32, added to the sums before they are
    rounded. **Raises:** `ValueError` for shapes that the kernel can't take.

    Several `x` and as many `w` are taken for one of each, side by side: the sum of their products, and one tail.
    `part`: (first, R) of the ranks of `thin`, if not all; then R alone decides on its layout, 16 or more.

    With a third axis before the others, `tail` is one for each of as many runs of equally many rows. A run is a
    multiple of the rows of a block of `config`.
    """
    xs, ws = (v if isinstance(v, tuple) else (v,) for v in (x, w))
    m, n = xs[0].shape[0], ws[0].shape[0] if transposed else ws[0].shape[1]
    k = sum(x.shape[1] for x in xs)
    first, rank = part or (0, 0 if thin is None else rank_of(thin))
    run = m // tail.shape[0] if tail is not None and tail.ndim == 3 else None
    problem = unsupported(m, k, n, rank, config, masked=seed is not None, run=run)
    if problem:
        raise ValueError(problem)
    given = {"thin_g": thin, "tail_g": tail, "bias_g": padded_bias(bias, config.block[1]), "seed_g": seed}
    given = {name: operand for name, operand in given.items() if operand is not None}

    def lora_gemm(*refs):
        xs_g, ws_g, rest = refs[: len(xs)], refs[len(xs) : 2 * len(xs)], refs[2 * len(xs) :]
        _kernel(
            xs_g, ws_g, rest[-1], **dict(zip(given, rest, strict=False)),
            first_rank=first, rank=rank, run=run, config=config, transposed=transposed, threshold=threshold,
        )  # fmt: skip

    return mosaic.kernel(
        lora_gemm,
        out_type=jax.ShapeDtypeStruct((m, n), xs[0].dtype),
        grid=(sms // 2 if config.cluster else sms,),
        grid_names=("blocks",),
        cluster=(2,) if config.cluster else (1,),
        cluster_names=("cluster",),
        num_threads=3,
        interpret=interpret,
    )(*xs, *ws, *given.values())


def _kernel(
    xs_g, ws_g, y_g, *, thin_g: Any = None, tail_g: Any = None, bias_g: Any = None, seed_g: Any = None,
    first_rank: int, rank: int, run: int | None, config: GemmConfig, transposed: bool, threshold: int,
):  # fmt: skip
    c = config
    dtype = y_g.dtype
    m, n = y_g.shape
    cta_m, cta_n = c.cta
    tiles = pl.cdiv(m, c.block[0]), pl.cdiv(n, c.block[1])
    counts = [pl.cdiv(x_g.shape[1], K_TILE) for x_g in xs_g]
    main_steps = sum(counts)
    ring_tail = rank > 0 and in_ring(rank)
    own_tail = rank > 0 and not ring_tail
    steps = main_steps + (rank // K_TILE if ring_tail else 0)
    # A masked tail is multiplied while the tile is stored; until then it keeps its slots.
    mixed = steps if seed_g is None else main_steps
    # A warpgroup must wait for every phase of a barrier that it waits for at all: each team has barriers of its own.
    teams = 2 if c.takes_turns else 1
    smem = functools.partial(mosaic.shared, dtype=dtype)
    # The two halves of a part of `W` or of the tail lie apart: a warpgroup's operand must be contiguous.
    halves = (2, cta_n // 2) if c.split == "n" else (1, cta_n)

    scratch = {
        "x_s": smem((c.stages, cta_m, K_TILE)),
        "w_s": smem((c.stages, cta_n, K_TILE)) if transposed else smem((c.stages, halves[0], K_TILE, halves[1])),
        "y_s": smem((2, c.store_slots, 64, c.store_n)),
        "full": plgpu.Barrier(num_arrivals=1 + (1 if transposed else halves[0]), num_barriers=teams * c.stages),
        "free": _free_barrier(c),
    }
    if own_tail:
        scratch |= {
            "thin_s": smem((rank, cta_m), summed=rank),
            "tail_s": smem((halves[0], rank, halves[1]), summed=rank),
            "tail_full": plgpu.Barrier(num_arrivals=1 + halves[0], num_barriers=teams),
            "tail_free": plgpu.Barrier(num_arrivals=1 if c.takes_turns else 2),
        }

    @functools.partial(pl.run_scoped, collective_axes="wg", **scratch)
    def _(
        x_s, w_s, y_s, full, free, thin_s: Any = None, tail_s: Any = None, tail_full: Any = None, tail_free: Any = None
    ):
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

        def tail_of(m0):
            return tail_g if run is None else tail_g.at[lax.div(m0, run)]

        def multicast(side):
            return "cluster" if c.cluster == side else None

        def load_step(left_g, right_g, slot, team, step, m0, n0, left0=0):
            ks, done = pl.ds(step * K_TILE, K_TILE), full.at[team * c.stages + slot]
            left = left_g.at[pl.ds(m0, cta_m), pl.ds(left0 + step * K_TILE, K_TILE)]
            plgpu.copy_gmem_to_smem(left, x_s.at[slot], done, collective_axes=multicast("n"))
            if transposed:
                plgpu.copy_gmem_to_smem(
                    right_g.at[pl.ds(n0, cta_n), ks], w_s.at[slot], done, collective_axes=multicast("m")
                )
                return
            for half in range(halves[0]):
                ns = pl.ds(n0 + half * halves[1], halves[1])
                plgpu.copy_gmem_to_smem(right_g.at[ks, ns], w_s.at[slot, half], done, collective_axes=multicast("m"))

        def load_tail(team, m0, n0):
            done = tail_full.at[team]
            plgpu.copy_gmem_to_smem(thin_g.at[pl.ds(first_rank, rank), pl.ds(m0, cta_m)], thin_s, done)
            for half in range(halves[0]):
                ns = pl.ds(n0 + half * halves[1], halves[1])
                plgpu.copy_gmem_to_smem(tail_of(m0).at[:, ns], tail_s.at[half], done)

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

                    @pl.when(step < main_steps)
                    def _():
                        def load(i, at):
                            load_step(xs_g[i], ws_g[i], slot, team, at, m0, n0)

                        mosaic.side_by_side(step, counts, load)

                    if ring_tail:

                        @pl.when(step >= main_steps)
                        def _():
                            load_step(thin_g, tail_of(m0), slot, team, step - main_steps, m0, n0, first_rank)

                    if own_tail:
                        # By now the last tile's tail was used: its products came before those of this ring's slots.
                        @pl.when(step == c.stages)
                        def _():
                            @pl.when(turn > 0)
                            def _():
                                plgpu.barrier_wait(tail_free)

                            load_tail(team, m0, n0)

            # Every phase of a barrier has to be seen before the barrier goes.
            @pl.when(turns > 0)
            def _():
                @pl.loop(turns * steps - c.stages, turns * steps)
                def _(count):
                    plgpu.barrier_wait(free.at[lax.rem(count, c.stages)])

                if own_tail:
                    plgpu.barrier_wait(tail_free)

        @pl.when(wg < 2)
        def _multiply():
            plgpu.set_max_registers(mosaic.registers_left(MEMORY_REGISTERS, 2), action="increase")
            team = wg if c.takes_turns else 0
            my_m, my_n = c.tile_m * (c.split == "m"), c.tile_n * (c.split == "n")

            def lhs(slot, i=None):
                """My rows of `x` in a slot, or 64 of them from `i` on."""
                if i is None and c.split != "m":
                    return x_s.at[slot]
                return x_s.at[slot, pl.ds(wg * my_m + (i or 0), c.tile_m if i is None else 64)]

            def rhs(slot, j=None, width=0):
                """My columns of `W` in a slot, or `width` of them from `j` on."""
                if transposed:
                    if j is None and c.split != "n":
                        return mosaic.transpose(w_s.at[slot])
                    return mosaic.transpose(w_s.at[slot, pl.ds(wg * my_n + (j or 0), width or c.tile_n)])
                mine = w_s.at[slot, wg if c.split == "n" else 0]
                return mine if j is None else mine.at[:, pl.ds(j, width)]

            def tail_lhs(i=None):
                if i is None and c.split != "m":
                    return mosaic.transpose(thin_s)
                return mosaic.transpose(thin_s.at[:, pl.ds(wg * my_m + (i or 0), c.tile_m if i is None else 64)])

            def tail_rhs(j=None, width=0):
                mine = tail_s.at[wg if c.split == "n" else 0]
                return mine if j is None else mine.at[:, pl.ds(j, width)]

            @pl.loop(wg if c.takes_turns else 0, turns, step=2 if c.takes_turns else 1)
            def _(turn):
                m0, n0 = tile_of(turn)
                first = turn * steps
                bias = bias_pieces(bias_g, n0 + wg * my_n, c.tile_n, c.store_n)

                def slot_of(step):
                    return lax.rem(first + step, c.stages)

                def product(acc):
                    @pl.loop(0, mixed)
                    def _(step):
                        slot = slot_of(step)
                        plgpu.barrier_wait(full.at[team * c.stages + slot])
                        plgpu.wgmma(acc, lhs(slot), rhs(slot))
                        plgpu.wgmma_wait(c.delay)

                        @pl.when(step >= c.delay)
                        def _():
                            plgpu.barrier_arrive(free.at[slot_of(step - c.delay)])

                    if own_tail:
                        plgpu.barrier_wait(tail_full.at[team])
                    if own_tail and seed_g is None:
                        plgpu.wgmma(acc, tail_lhs(), tail_rhs())
                        plgpu.wgmma_wait(1)
                    else:
                        plgpu.wgmma_wait(0)
                    if c.delay:
                        plgpu.barrier_arrive(free.at[slot_of(mixed - 1)])
                    if own_tail and seed_g is None:
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(tail_free)
                    return acc[...]

                result = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((c.tile_m, c.tile_n), jnp.float32))
                for step in range(mixed, steps):
                    plgpu.barrier_wait(full.at[team * c.stages + slot_of(step)])

                def low_rank(i, j):
                    def multiply(acc):
                        if own_tail:
                            plgpu.wgmma(acc, tail_lhs(i), tail_rhs(j, c.store_n))
                        for step in range(mixed, steps):
                            plgpu.wgmma(acc, lhs(slot_of(step), i), rhs(slot_of(step), j, c.store_n))
                        plgpu.wgmma_wait(0)
                        return acc[...]

                    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((64, c.store_n), jnp.float32))

                store_tile(
                    result, y_g, y_s.at[wg], m0 + wg * my_m, n0 + wg * my_n,
                    bias=bias, seed_g=seed_g, threshold=threshold, low_rank=low_rank,
                )  # fmt: skip
                for step in range(mixed, steps):
                    plgpu.barrier_arrive(free.at[slot_of(step)])
                if own_tail and seed_g is not None:
                    plgpu.barrier_arrive(tail_free)

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
