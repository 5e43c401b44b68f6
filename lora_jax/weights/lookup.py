"""Gathers that pick positions on some axes of a weight: embedding lookups and stacks indexed by arrays."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import jax
from jax import lax

from lora_jax import _compat
from lora_jax.sites import Atom
from lora_jax.weights.virtual import Dims, Virtual

# The dimensions that a gather picks from, each with its column of the index array.
Picks = Mapping[int, int]


def picks_of(eqn: Any) -> Picks | None:
    """What a gather picks, if it takes single positions on some axes and all of the others; else None."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    if numbers.operand_batching_dims or numbers.start_indices_batching_dims:
        return None
    columns = {d: column for column, d in enumerate(numbers.start_index_map)}
    whole = [d for d, size in enumerate(sizes) if size == shape[d] and d not in numbers.collapsed_slice_dims]
    # A whole axis may be indexed too (a batched dynamic_slice does it): its start is clamped to 0, where it is clamped.
    clamps = eqn.params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if any(d in columns for d in whole) and not clamps:
        return None
    picked = [d for d in range(len(shape)) if d not in whole]
    if not picked or any(sizes[d] != 1 or d not in columns for d in picked):
        return None
    return {d: columns[d] for d in picked}


def batch_atoms(atom: Atom, eqn: Any) -> tuple[Atom, ...]:
    """Names for the result's index dimensions. A negative axis marks them as none of the parameter's own."""
    shape = eqn.invars[1].aval.shape[:-1]
    return tuple(Atom(-1 - atom.axis, position + atom.stride * 100, n) for position, n in enumerate(shape))


def take_from_factor(
    array: jax.Array, picks: Picks, indices: jax.Array, eqn: Any, everywhere: Mapping[int, jax.Array] | None = None
) -> jax.Array:
    """The gather of `eqn` applied to a factor: index dimensions first, then the factor's axes not in `picks`.

    `everywhere`: axes that have one position for all indices, which is gathered along with theirs. What the model
    fills in out of bounds (NaN, a given value) is the base's part; the factors add nothing to it.
    """
    batch = indices.ndim - 1
    for axis, position in (everywhere or {}).items():
        picks = {**picks, axis: indices.shape[-1]}
        column = lax.broadcast_in_dim(position.astype(indices.dtype), (*indices.shape[:-1], 1), ())
        indices = lax.concatenate([indices, column], batch)
    axes = tuple(sorted(picks))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(batch, batch + array.ndim - len(axes))),
        collapsed_slice_dims=axes,
        start_index_map=axes,
    )
    columns = [lax.slice_in_dim(indices, picks[d], picks[d] + 1, axis=batch) for d in axes]
    sizes = tuple(1 if d in picks else n for d, n in enumerate(array.shape))
    return lax.gather(
        array, lax.concatenate(columns, batch), numbers, sizes,
        mode=eqn.params["mode"], fill_value=0,
    )  # fmt: skip


def picked(w: Virtual, picks: Picks, indices: jax.Array, eqn: Any) -> Virtual:
    """The view after a gather picked positions on some axes, of the base and of every factor that carries one."""
    column = {w.dims[d][0]: c for d, c in picks.items()}
    batch = batch_atoms(min(column), eqn)
    factors, axes = dict(w.factors), []
    for name, _ in w.axes:
        array, names = w.live_factor(name)
        mine = {names.index(atom): c for atom, c in column.items() if atom in names}
        if mine:
            array = take_from_factor(array, mine, indices, eqn)
            names = (*batch, *(n for n in names if n not in column))
        factors[name] = array
        axes.append((name, names))
    gone = tuple((atom, "pick") for atom in column)
    return w.replace(
        base=_compat.bind(eqn, [w.base, indices])[0], factors=factors, axes=tuple(axes),
        dims=rest_of_gather(w, picks, eqn, batch), dropped=(*w.dropped, *gone),
    )  # fmt: skip


def rest_of_gather(w: Virtual, picks: Picks, eqn: Any, batch: tuple[Hashable, ...]) -> Dims:
    """The dimensions of the gather's result in terms of atoms."""
    numbers = eqn.params["dimension_numbers"]
    kept = iter(() if d in picks else dim for d, dim in enumerate(w.dims) if d not in numbers.collapsed_slice_dims)
    index = iter(batch)
    rank = eqn.outvars[0].aval.ndim
    return tuple(next(kept) if d in numbers.offset_dims else (next(index),) for d in range(rank))  # type: ignore[misc]
