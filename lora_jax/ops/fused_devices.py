"""Products on fused kernels, of whole operands that may be split over devices.

Three layers, outermost first: under `vmap`, where it is differentiated once more, and on any other platform that the
program may be lowered for, XLA; where operands may be split over devices, the part of each device; on one device, the
kernels (`fused_part`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap

from lora_jax.ops import fused_part, partition
from lora_jax.ops.contract import Axes
from lora_jax.ops.families import FAMILIES
from lora_jax.ops.fused import Fused, own
from lora_jax.ops.fused_part import Some
from lora_jax.ops.plain import Wants
from lora_jax.ops.split import Split


def forward(
    fused: Fused, x: Any, ws: Some, a_s: Some, b_s: Some, biases: Some, seed: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Each `y`, and the `h` of all, of whole operands, which may be split over devices."""
    m, count = fused.one, len(fused.matrices)

    def added(run: Any) -> Any:
        def call(split: Split, *operands: Any) -> tuple[jax.Array, ...]:
            x, ws, a_s, b_s, biases, (seed,) = _grouped(operands, (None, *[count] * 4, 1))
            # Where the results of several devices are added, one of them adds the bias.
            biases = [None if bias is None else split.once(bias, m.inner) for bias in biases]
            ys, hs = run(fused, split, x, ws, a_s, b_s, biases, seed)
            return tuple(split.add(out, m.inner) for out in (*ys, *hs))

        return call

    spec = fused.spec
    axes = [fused.x]
    for each in (spec.w, spec.first, spec.second, spec.bias):
        axes += fused.each(each)
    out = [*fused.each(fused.y), *fused.hs]
    wishes = (0, *range(1, 1 + count), 0)
    run = _over_devices(fused, added(fused_part.forward), added(fused_part.plain_forward), out, wishes, m.inner)
    found = list(run([x, *ws, *a_s, *b_s, *biases, seed], [*axes, ("seed",)]))
    return found[:count], found[count:]


def backward(
    fused: Fused, dys: Some, x: Any, ws: Some, a_s: Some, b_s: Some, hs: Some, seed: Any, wants: Wants
) -> tuple[jax.Array | None, list[jax.Array] | None, list[jax.Array] | None]:
    """Gradients of whole operands: of `x` in its dtype, of each `a` and each `b` in float32."""
    m, count, spec = fused.one, len(fused.matrices), fused.spec

    def added(run: Any) -> Any:
        def call(split: Split, *operands: Any) -> tuple[jax.Array, ...]:
            dys, x, ws, a_s, b_s, hs, (seed,) = _grouped(operands, (count, None, *[count] * 3, len(fused.hs), 1))
            dx, das, dbs = run(fused, split, wants, dys, x, ws, a_s, b_s, hs, seed)
            # What a device has seen only part of. Weights are split alike, or not at all.
            unseen = ((dx, m.outer), *((da, (*m.rows, *m.outer)) for da in das or ()))
            unseen = (*unseen, *((db, m.rows) for db in dbs or ()))
            return tuple(split.add(gradient, axes) for gradient, axes in unseen if gradient is not None)

        return call

    axes = [*fused.each(fused.y), fused.x]
    for each in (spec.w, spec.first, spec.second):
        axes += fused.each(each)
    out = [[fused.x], fused.each(spec.first), fused.each(spec.second)]
    out = [group for group, wanted in zip(out, wants, strict=True) if wanted]
    wishes = (0, *range(count + 1, 2 * count + 1), 0, count)
    local, by_xla = added(fused_part.backward), added(fused_part.plain_backward)
    run = _over_devices(fused, local, by_xla, [axes for group in out for axes in group], wishes, ())
    found = iter(run([*dys, x, *ws, *a_s, *b_s, *hs, seed], [*axes, *fused.hs, ("seed",)]))
    dx = next(found) if wants.x else None
    das, dbs = ([next(found) for _ in range(count)] if wanted else None for wanted in wants[1:])
    return dx, das, dbs


def _over_devices(
    fused: Fused, local: Any, by_xla: Any, out: Sequence[Axes], wishes: Sequence[int], summed: Axes
) -> Any:
    """A function of operands with their axes, some of them None, from functions of `split` and all operands."""
    rows, count = fused.one.rows, len(fused.matrices)
    size = dict(fused.one.size)
    for i, m in enumerate(fused.matrices):
        size |= dict(zip(own(i, m.outer), m.shape(m.outer), strict=True))

    def run(operands: list[Any], axes: list[Axes]) -> Sequence[jax.Array]:
        there = [i for i, operand in enumerate(operands) if operand is not None]

        def every(fn: Any) -> Any:
            def of_given(split: Split, *parts: Any) -> Any:
                place = dict(zip(there, parts, strict=True))
                return fn(split, *map(place.get, range(len(operands))))

            return of_given

        over_devices = partition.split_over_devices(
            every(local), every(by_xla), functools.partial(anywhere, fused.family), [axes[i] for i in there], out,
            size=size, rows=rows, wishes=wishes, summed=summed,
            alike=[tuple(own(i, (axis,))[0] for i in range(count)) for axis in fused.one.outer],
        )  # fmt: skip
        return over_devices(*(operands[i] for i in there))

    return run


def anywhere(family: str, run: Any, by_xla: Any) -> Any:
    """`run` on the kernels' platforms and `by_xla` on others; `by_xla` under `vmap` and where it is differentiated.

    The latter are second derivatives: those of the forward pass have a rule of their own (`low_rank`).
    """
    platforms = FAMILIES[family].platforms

    @custom_vmap
    def call(*operands: Any) -> Any:
        return lax.platform_dependent(*operands, **{name: run for name in platforms}, default=by_xla)

    @call.def_vmap
    def _(size: int, mapped: Any, *operands: Any) -> Any:
        out = jax.vmap(by_xla, in_axes=tuple(0 if one else None for one in mapped), axis_size=size)(*operands)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def differentiable(*operands: Any) -> Any:
        return call(*operands)

    @differentiable.defjvp
    def _(operands: Any, tangents: Any) -> Any:
        return jax.jvp(by_xla, operands, tangents)

    return differentiable


def _grouped(operands: Some, counts: Sequence[int | None]) -> list[Any]:
    """In lists of these lengths; None: one that is in no list."""
    left = iter(operands)
    return [next(left) if count is None else [next(left) for _ in range(count)] for count in counts]
