"""Where a virtual weight meets data: products, convolutions, grouped products, lookups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_jax.rules import rule
from lora_jax.weights.lookup import single_axis
from lora_jax.weights.virtual import DotGeneral, Virtual, is_virtual


@rule("dot_general")
def dot_general(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    lhs, rhs = ins
    if is_virtual(lhs) and is_virtual(rhs):
        # Rows looked up in a table are activations: `embed[tokens] @ kernel` is a use of `kernel`.
        rows = [_is_lookup(lhs), _is_lookup(rhs)]
        if sum(rows) != 1:
            return None
        lhs, rhs = (interpreter.dense(x, "dot_general") if row else x for x, row in zip(ins, rows, strict=True))
    w, x = (lhs, rhs) if is_virtual(lhs) else (rhs, lhs)
    dot = name_axes(eqn, w, w is lhs)
    with eqn.ctx.manager:
        y = w.kind.dot_general(w, x, dot, interpreter.key_for(w), eqn)
    return None if y is None else [y]


def _is_lookup(w: Virtual) -> bool:
    """Whether a view has dimensions that are none of the parameter's own (see `batch_atoms`)."""
    return any(atom.axis < 0 for atom in w.visible)


def name_axes(eqn: Any, w: Virtual, weight_first: bool) -> DotGeneral:
    """Gives every axis of a `dot_general` a name: the weight's atoms, and the data's own dimensions."""
    contracting, batch = eqn.params["dimension_numbers"]
    side, other = (0, 1) if weight_first else (1, 0)
    x_shape = eqn.invars[other].aval.shape
    shared = dict(zip((*contracting[other], *batch[other]), (*contracting[side], *batch[side]), strict=True))
    x_names: list[tuple[Any, ...]] = [w.dims[shared[d]] if d in shared else (f"x{d}",) for d in range(len(x_shape))]
    x_free = [x_names[d] for d in range(len(x_shape)) if d not in shared]
    taken = {*contracting[side], *batch[side]}
    w_free = [dim for d, dim in enumerate(w.dims) if d not in taken]
    y_names = [w.dims[d] for d in batch[side]] + (w_free + x_free if weight_first else x_free + w_free)
    sizes = {name: x_shape[d] for d in range(len(x_shape)) for name in x_names[d] if isinstance(name, str)}

    def shape(names: Sequence[Any]) -> tuple[int, ...]:
        return tuple(sizes[n] if isinstance(n, str) else w.size(n) for n in names)

    x_flat = tuple(name for names in x_names for name in names)
    y_flat = tuple(name for names in y_names for name in names)
    out_shape = tuple(eqn.outvars[0].aval.shape)
    assert math.prod(shape(y_flat)) == math.prod(out_shape), (eqn, x_names, y_names)
    return DotGeneral(
        x=x_flat, w=w.visible, y=y_flat, split_x=shape(x_flat), split_w=shape(w.visible), out_shape=out_shape,
        precision=eqn.params["precision"], preferred_element_type=eqn.params["preferred_element_type"],
    )  # fmt: skip


@rule("conv_general_dilated")
def conv(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    x, w = ins
    if is_virtual(x):
        return None
    y = w.kind.conv(w, x, interpreter.key_for(w), eqn)
    return None if y is None else [y]


@rule("ragged_dot_general", "ragged_dot")
def ragged_dot(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """Grouped products of mixture-of-experts layers, in their plain form (tokens, groups)."""
    x, w, sizes = ins
    if is_virtual(x) or is_virtual(sizes):
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, batch) = numbers.dot_dimension_numbers
    plain = (
        tuple(map(tuple, contracting)) == ((1,), (1,))
        and tuple(map(tuple, batch)) == ((), ())
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
        and eqn.params.get("group_offset") is None
    )
    y = w.kind.ragged_dot(w, x, sizes, interpreter.key_for(w), eqn) if plain else None
    return None if y is None else [y]


@rule("gather")
def gather(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    w, indices = ins
    axis = single_axis(eqn)
    if is_virtual(indices) or not is_virtual(w) or axis is None or len(w.dims[axis]) != 1:
        return None
    out = w.kind.gather(w, axis, indices, eqn)
    return None if out is None else [out]
