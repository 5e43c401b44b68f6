"""A two-operand einsum whose axes carry any hashable names."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Axes = tuple[Hashable, ...]


def contract(
    x: jax.Array,
    x_axes: Axes,
    y: jax.Array,
    y_axes: Axes,
    out_axes: Axes,
    *,
    summed: Axes = (),
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """Sums over every name missing from `out_axes`; shared names that stay are batch axes.

    Lowers to one `dot_general`, and to one transpose only if neither operand order gives `out_axes`. `summed`
    gives the order in which shared axes are summed, which decides the last bits; by default `y`'s. `out_sharding`
    is that of the result, for meshes with explicit axes.
    """
    x_set, y_set, out = set(x_axes), set(y_axes), set(out_axes)
    assert len(x_set) == len(x_axes) and len(y_set) == len(y_axes), (x_axes, y_axes)
    assert out <= (x_set | y_set), (x_axes, y_axes, out_axes)
    x, x_axes = _sum_out(x, x_axes, x_set - y_set - out)
    y, y_axes = _sum_out(y, y_axes, y_set - x_set - out)
    batch = [name for name in out_axes if name in x_set and name in y_set]
    summed = summed or tuple(name for name in y_axes if name in x_set and name not in out)
    x_free = [name for name in x_axes if name not in y_set]
    y_free = [name for name in y_axes if name not in x_set]
    got = (*batch, *x_free, *y_free)
    if got != tuple(out_axes) and (*batch, *y_free, *x_free) == tuple(out_axes):
        x, x_axes, y, y_axes = y, y_axes, x, x_axes
        got = tuple(out_axes)
    result = lax.dot_general(
        x,
        y,
        (
            (_positions(x_axes, summed), _positions(y_axes, summed)),
            (_positions(x_axes, batch), _positions(y_axes, batch)),
        ),
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=reordered_sharding(out_sharding, out_axes, got),
    )
    return reorder(result, got, out_axes)


def reorder(x: jax.Array, axes: Sequence[Hashable], to: Sequence[Hashable]) -> jax.Array:
    """Transposes `x` from the order `axes` to the order `to`."""
    return x if tuple(axes) == tuple(to) else lax.transpose(x, _positions(axes, to))


def short(x: jax.Array) -> jax.Array:
    """Without axes of length one."""
    return lax.squeeze(x, [d for d, n in enumerate(x.shape) if n == 1])


def ordered(x: jax.Array, axes: Axes, to: Axes) -> jax.Array:
    """`x` with the axes `to`; those that are left out have length one."""
    x = lax.squeeze(x, [d for d, name in enumerate(axes) if name not in to])
    return reorder(x, tuple(name for name in axes if name in to), to)


def spread(x: jax.Array, axes: Sequence[Hashable], over: Sequence[Hashable]) -> jax.Array:
    """`x` with an axis for each name of `over`, of length one where it has none: ready to broadcast."""
    order = [name for name in over if name in axes]
    x = reorder(x, axes, order)
    return x.reshape([x.shape[order.index(name)] if name in order else 1 for name in over])


def reordered_sharding(sharding: Any, axes: Axes, to: Axes) -> Any:
    """The sharding of an array of axes `axes` for one of axes `to`: of axes it lacks, none is split."""
    if sharding is None:
        return None
    spec = dict(zip(axes, sharding.spec, strict=False))
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec.get(name) for name in to)))


def _positions(axes: Sequence[Hashable], names: Sequence[Hashable]) -> tuple[int, ...]:
    return tuple(list(axes).index(name) for name in names)


def _sum_out(x: jax.Array, axes: Axes, names: set[Hashable]) -> tuple[jax.Array, Axes]:
    if not names:
        return x, axes
    return x.sum(_positions(axes, sorted(names, key=axes.index))), tuple(a for a in axes if a not in names)
