"""What the Hopper kernels share: shared memory, transposed views, spots that depend on the version of Pallas."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

# Pallas of jax 0.10 finds no layout for a result that is stored transposed.
STORES_TRANSPOSED = jax.__version_info__ >= (0, 11)
_WHOLE = () if jax.__version_info__ >= (0, 11) else ((),)


def shared(shape: tuple[int, ...], dtype: Any, summed: int = 64) -> Any:
    """Shared memory that the copy engine fills and the tensor cores read: tiled, with the widest swizzle that fits.

    `summed`: the operand's depth. Pallas issues products in groups as deep as the swizzle is wide.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(math.gcd(shape[-1], summed) * itemsize * 8)
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)),
    )


def transpose(ref: Any) -> Any:
    """The transposed view of a two-dimensional reference; nothing is moved."""
    if jax.__version_info__ >= (0, 11):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def load(ref: Any) -> jax.Array:
    """Reads shared memory into registers, laid out as a product's result is."""
    return plgpu.load(ref, *_WHOLE, layout=plgpu.Layout.WGMMA)


def load_global(ref: Any) -> jax.Array:
    """Reads a matrix in global memory into registers, laid out as a product's result is; meant for small ones."""
    return plgpu.load(ref, *_WHOLE, layout=plgpu.Layout.WGMMA, optimized=False)


def load_row(ref: Any) -> jax.Array:
    """Reads a vector in global memory into registers, laid out as a row of a product's result is: each value in
    the threads that need it, so that broadcasting over rows costs nothing."""
    return plgpu.load(ref, *_WHOLE, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def kernel(body: Any, *, interpret: Any = None, **options: Any) -> Any:
    """A function of operands that runs `body` on a grid; its warpgroups are the axis "wg"."""
    options |= {} if interpret is None else {"interpret": interpret}
    parameters = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    launch = plgpu.kernel(body, thread_name="wg", compiler_params=parameters, **options)

    def run(*operands: jax.Array) -> Any:
        # Where a user has 64-bit types on, plain numbers would become int64 beside the int32 of places in a grid.
        with jax.enable_x64(False):
            return launch(*operands)

    return run


def registers_left(memory: int, multiplying: int) -> int:
    """Registers a thread of each multiplying warpgroup, when one other has `memory`: 512 a lane in all, in eights."""
    return min(256, (512 - memory) // multiplying) // 8 * 8


def side_by_side(step: Any, counts: Sequence[int], copy: Any) -> None:
    """A walk along operands that lie side by side, `counts` steps each: `copy(i, step)` for the one at `step`."""
    first = 0
    for i, count in enumerate(counts):
        if len(counts) == 1:
            copy(i, step)
            return
        here = step >= first
        if i + 1 < len(counts):  # else beyond the end too, where copies bring zeros
            here &= step < first + count
        pl.when(here)(functools.partial(copy, i, step - first))
        first += count


def fill(steps: int, stages: int, load: Any, free: Any) -> None:
    """The loading warpgroup's part of a ring: `load(slot, step)` for each step, as slots come free."""

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, stages)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        load(slot, step)

    # Every phase of a barrier has to be seen before the barrier goes.
    @pl.loop(max(steps - stages, 0), steps)
    def _(step):
        plgpu.barrier_wait(free.at[lax.rem(step, stages)])


def drain(steps: int, stages: int, use: Any, full: Any, free: Any, workers: int) -> None:
    """A multiplying warpgroup's part: `use(slot, step)` starts one product, of which one stays in flight.

    The `workers` warpgroups take steps in turn; `stages` is a multiple of them, so that each has slots of its own, and
    at least twice as many: a slot is free only once the next product of its worker has begun.
    """
    assert stages % workers == 0 and stages >= 2 * workers, (stages, workers)

    @pl.loop(lax.axis_index("wg"), steps, step=workers)
    def _(step):
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(full.at[slot])
        use(slot, step)
        plgpu.wgmma_wait(1)

        @pl.when(step >= workers)
        def _():
            plgpu.barrier_arrive(free.at[lax.rem(step - workers, stages)])

    plgpu.wgmma_wait(0)
    mine = lax.axis_index("wg")

    @pl.when(mine < steps)
    def _():
        last = steps - 1 - lax.rem(steps - 1 - mine, workers)
        plgpu.barrier_arrive(free.at[lax.rem(last, stages)])


def summed(own: jax.Array, others_s: Any, ready: Any, use: Any, workers: int) -> None:
    """Adds the float32 results of all workers in a fixed order and gives the sum to `use`, in the first of them."""
    mine = lax.axis_index("wg")

    @pl.when(mine > 0)
    def _():
        others_s[mine - 1] = own
        plgpu.barrier_arrive(ready)

    @pl.when(mine == 0)
    def _():
        total = own
        if workers > 1:
            plgpu.barrier_wait(ready)
        for i in range(workers - 1):
            total += load(others_s.at[i])
        use(total)
