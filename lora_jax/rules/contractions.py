"""Where a virtual weight meets data: products, convolutions, grouped products, lookups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.rules import rule
from lora_jax.weights.lookup import picks_of
from lora_jax.weights.virtual import DotGeneral, Virtual, is_virtual


@rule("dot_general")
def dot_general(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    lhs, rhs = _one_weight(interpreter, ins)
    if not is_virtual(lhs) and not is_virtual(rhs):
        return None
    w, x = (lhs, rhs) if is_virtual(lhs) else (rhs, lhs)
    dot = name_axes(eqn, w, w is lhs)
    y = w.kind.dot_general(w, x, dot, interpreter.key_for(w), eqn)
    return None if y is None else [y]


def _one_weight(interpreter: Any, ins: Sequence[Any]) -> list[Any]:
    """Where two parameters meet, one is data: a looked-up row (`embed[tokens] @ kernel`), a learnt query.

    Failing a row, what was formed from parameters, then the one with fewer axes, then the first. Both are arrays
    where one object stands on both sides.
    """
    both = [x for x in ins if is_virtual(x)]
    if len(both) < 2:
        return list(ins)
    data = min(both, key=lambda w: (not w.is_row, not w.kind.is_formed, len(w.own_axes)))
    return [interpreter.dense(x, "dot_general") if x is data else x for x in ins]


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
        x=x_flat, w=w.visible, y=y_flat,
        summed=tuple(atom for d in contracting[side] for atom in w.dims[d]),
        split_x=shape(x_flat), split_w=shape(w.visible), out_shape=out_shape,
        precision=eqn.params["precision"], preferred_element_type=eqn.params["preferred_element_type"],
        out_sharding=_split_sharding(eqn.params.get("out_sharding"), y_names),
    )  # fmt: skip


def _split_sharding(sharding: Any, names: Sequence[tuple[Any, ...]]) -> Any:
    """The sharding of a product whose dimensions are split into `names`: the outermost of each is divided."""
    if sharding is None:
        return None
    spec = (*sharding.spec, *(None,) * (len(names) - len(sharding.spec)))
    entries = [entry if n == 0 else None for dim, entry in zip(names, spec, strict=True) for n in range(len(dim))]
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


@rule("conv_general_dilated")
def conv(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    x, w = ins
    if not is_virtual(w):
        return None
    x = interpreter.dense(x, "conv_general_dilated")  # a looked-up row, which is data
    y = w.kind.conv(w, x, interpreter.key_for(w), eqn)
    return None if y is None else [y]


@rule("ragged_dot_general", "ragged_dot")
def ragged_dot(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """Grouped products of mixture-of-experts layers, in their plain form (tokens, groups)."""
    x, w, sizes = ins
    if not is_virtual(w) or is_virtual(sizes):
        return None
    x = interpreter.dense(x, "ragged_dot_general")
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
    picks = picks_of(eqn)
    if is_virtual(indices) or not is_virtual(w) or not picks:
        return None
    if any(len(w.dims[d]) != 1 or w.dims[d][0].is_repeat for d in picks):
        return None
    return [w.kind.gather(w, picks, indices, eqn)]
