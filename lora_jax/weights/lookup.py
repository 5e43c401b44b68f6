"""Gathers along one axis of a weight: embedding lookups and stacks indexed by arrays."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
from jax import lax

from lora_jax.sites import Atom
from lora_jax.weights.virtual import Dims, Virtual


def single_axis(eqn: Any) -> int | None:
    """The one axis a gather indexes while taking all of the others, or None for other gathers."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    if len(numbers.start_index_map) != 1 or numbers.collapsed_slice_dims != numbers.start_index_map:
        return None
    if numbers.operand_batching_dims or numbers.start_indices_batching_dims:
        return None
    axis = numbers.start_index_map[0]
    whole = all(size == n for d, (size, n) in enumerate(zip(sizes, shape, strict=True)) if d != axis)
    return axis if whole and sizes[axis] == 1 else None


def batch_atoms(atom: Atom, eqn: Any) -> tuple[Atom, ...]:
    """Names for the result's index dimensions. A negative axis marks them as none of the parameter's own."""
    shape = eqn.invars[1].aval.shape[:-1]
    return tuple(Atom(-1 - atom.axis, position + atom.stride * 100, n) for position, n in enumerate(shape))


def take_from_factor(
    array: jax.Array, axis: int, indices: jax.Array, eqn: Any, atom: Atom
) -> tuple[jax.Array, tuple[Atom, ...]]:
    """The gather of `eqn` applied to a factor: index dimensions first, then the factor's other axes."""
    batch = batch_atoms(atom, eqn)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(len(batch), len(batch) + array.ndim - 1)),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    sizes = tuple(1 if d == axis else n for d, n in enumerate(array.shape))
    taken = lax.gather(array, indices, numbers, sizes, mode=eqn.params["mode"], fill_value=eqn.params["fill_value"])
    return taken, batch


def rest_of_gather(w: Virtual, dim: int, eqn: Any, batch: tuple[Hashable, ...]) -> Dims:
    """The dimensions of the gather's result in terms of atoms."""
    offset = eqn.params["dimension_numbers"].offset_dims
    kept = iter(d for i, d in enumerate(w.dims) if i != dim)
    index = iter(batch)
    rank = eqn.outvars[0].aval.ndim
    return tuple(next(kept) if d in offset else (next(index),) for d in range(rank))  # type: ignore[misc]
