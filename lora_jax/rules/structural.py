"""Operations that only rearrange a weight: the view changes, nothing is computed on the factors but slices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax.rules import rule
from lora_jax.sites import Atom
from lora_jax.weights.virtual import Virtual, is_virtual


def _only_first(ins: Sequence[Any]) -> bool:
    return is_virtual(ins[0]) and not any(map(is_virtual, ins[1:]))


@rule(
    "copy",
    "copy_p",
    "name",
    "sharding_constraint",
    "layout_constraint",
    "pvary",
    "pcast",
)
def same_shape(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """Identities on values: the base goes through, the factors have nothing to follow."""
    return [ins[0].replace(base=_compat.bind(eqn, [ins[0].base])[0])] if len(ins) == 1 else None


@rule("reshard", "mesh_cast")
def reshard(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    """Another split of the base. Factors follow only onto another kind of mesh (`auto_axes`), whole on each device."""
    w = ins[0]
    base = _compat.bind(eqn, [w.base])[0]
    return [w.replace(base=base, factors={n: _compat.on_mesh_of(f, base) for n, f in w.factors.items()})]


@rule("optimization_barrier")
def barrier(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    out = _compat.bind(eqn, [x.base if is_virtual(x) else x for x in ins])
    return [x.replace(base=y) if is_virtual(x) else y for x, y in zip(ins, out, strict=True)]


@rule("convert_element_type")
def convert(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """A cast to another float dtype casts the base; factors keep their precision until they are used."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return None
    return [ins[0].replace(base=_compat.bind(eqn, [ins[0].base])[0])]


@rule("stop_gradient")
def stop_gradient(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    """Stops the factors' gradient too: the model asked for none through the effective weight."""
    w = ins[0]
    return [w.kind.stopped(w.replace(base=lax.stop_gradient(w.base), factors=lax.stop_gradient(w.factors)))]


@rule("transpose")
def transpose(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    w, order = ins[0], eqn.params["permutation"]
    return [w.replace(base=lax.transpose(w.base, order), dims=tuple(w.dims[d] for d in order))]


@rule("squeeze")
def squeeze(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    dims = eqn.params["dimensions"]
    return [ins[0].without_dims(lax.squeeze(ins[0].base, dims), dims)]


@rule("broadcast_in_dim")
def broadcast(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """New dimensions: of size one, or repeating the weight (a vmapped `cond` does it), which no factor follows."""
    if not _only_first(ins):
        return None
    w, shape, places = ins[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
    base = _compat.bind(eqn, [w.base])[0]
    grown = tuple(d for d, place in enumerate(places) if w.base.shape[d] != shape[place])
    source = {places[d]: () if d in grown else dim for d, dim in enumerate(w.dims)}
    dims = [source.get(place, ()) for place in range(len(shape))]
    gone = tuple((atom, "index") for d in grown for atom in w.dims[d])
    w = w.replace(base=base, dims=tuple(dims), dropped=(*w.dropped, *gone))
    repeated = [place for place, size in enumerate(shape) if size > 1 and not dims[place]]
    return [w.repeated(repeated)]


@rule("reshape")
def reshape(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """Regroups the atoms of the view, splitting one where a new dimension ends inside it."""
    w, shape = ins[0], eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None:
        return None
    return _regroup(w, lax.reshape(w.base, shape), shape)


def _regroup(w: Virtual, base: Any, shape: Sequence[int]) -> list[Any] | None:
    # Atoms of size one carry no data: leaving them out lets (1, D) become (D,) and back.
    unit = [atom for atom in w.visible if w.size(atom) == 1]
    queue = [atom for atom in w.visible if w.size(atom) != 1]
    dims: list[tuple[Atom, ...]] = []
    for size in shape:
        dim: list[Atom] = []
        left = size
        while left > 1:
            atom, length = queue[0], w.size(queue[0])
            if left % length == 0:
                dim.append(queue.pop(0))
                left //= length
            elif length % left == 0 and not atom.is_repeat:
                w, (outer, inner) = w.split(atom, (left, length // left))
                queue[0] = inner
                dim.append(outer)
                left = 1
            else:
                return None
        dims.append(tuple(dim))
    return [w.replace(base=base, dims=tuple(dims), dropped=(*w.dropped, *((a, "index") for a in unit)))]


@rule("slice")
def static_slice(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    w, p = ins[0], eqn.params
    strides = p["strides"] or (1,) * len(w.dims)
    for d, bounds in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        w = _cut(w, d, *bounds)
        if w is None:
            return None
    return [w]


def _cut(w: Virtual, d: int, start: int, limit: int, stride: int = 1) -> Virtual | None:
    """`start:limit:stride` of dimension `d`, or None where that cuts across the dimension's atoms."""
    if (start, limit, stride) == (0, w.base.shape[d], 1):
        return w
    parts = _bounds([w.size(atom) for atom in w.dims[d]], start, limit, stride)
    if parts is None:
        return None
    base = lax.slice_in_dim(w.base, start, limit, stride, axis=d)
    for atom, bounds in zip(w.dims[d], parts, strict=True):

        def cut(x: Any, axis: int, bounds=bounds) -> Any:
            return lax.slice_in_dim(x, *bounds, axis=axis)

        w = w.sliced(base, atom, len(range(*bounds)), cut)
    return w


def _bounds(sizes: list[int], start: int, limit: int, stride: int) -> list[tuple[int, int, int]] | None:
    """The slice of each atom that together are `start:limit:stride` of their row-major product."""
    if len(sizes) == 1:
        return [(start, limit, stride)]
    inner = math.prod(sizes[1:])
    if not sizes or start >= limit:
        return None
    if start % inner == 0 and limit % inner == 0 and stride == 1:
        return [(start // inner, limit // inner, 1), *((0, size, 1) for size in sizes[1:])]
    block = start // inner
    if (limit - 1) // inner != block:
        return None
    rest = _bounds(sizes[1:], start - block * inner, limit - block * inner, stride)
    return None if rest is None else [(block, block + 1, 1), *rest]


@rule("dynamic_slice")
def dynamic_slice(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    if not _only_first(ins):
        return None
    w, starts = ins[0], ins[1:]
    for d, size in enumerate(eqn.params["slice_sizes"]):
        if size == w.base.shape[d]:
            continue
        if len(w.dims[d]) != 1:
            return None

        def cut(x: Any, axis: int, start=starts[d], size=size) -> Any:
            return lax.dynamic_slice_in_dim(x, start, size, axis)

        atom = w.dims[d][0]
        w = w.sliced(cut(w.base, d), atom, size, cut)
        if size == 1:
            w = w.picked(d)
    return [w]


@rule("split")
def split(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    sizes = [int(size) for size in eqn.params["sizes"]]
    return _pieces(ins[0], eqn.params["axis"], sizes)


@rule("unstack")
def unstack(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """`split` into pieces of one, squeezed; jax >= 0.12 iterates over an array this way."""
    w, axis = ins[0], eqn.params["axis"]
    rows = _pieces(w, axis, [1] * w.base.shape[axis])
    return rows and [row.without_dims(lax.squeeze(row.base, (axis,)), (axis,)) for row in rows]


def _pieces(w: Virtual, axis: int, sizes: list[int]) -> list[Virtual] | None:
    ends = list(itertools.accumulate(sizes))
    pieces = [_cut(w, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]
    whole = [piece for piece in pieces if piece is not None]
    return whole if len(whole) == len(pieces) else None


@rule("rev")
def flip(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    """A transposed convolution flips its kernel. Flipping a product of atoms flips each of them."""
    w = ins[0]
    for atom in (atom for d in eqn.params["dimensions"] for atom in w.dims[d]):
        w = w.replace(factors=w.map_axis(atom, lambda x, axis: lax.rev(x, (axis,))))
    return [w.replace(base=lax.rev(w.base, eqn.params["dimensions"]))]


@rule("neg")
def negate(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    out = ins[0].kind.times(ins[0], lambda x: -x)
    return None if out is None else [out]


@rule("mul", "div")
def times_scalar(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """A weight times or over one number (an embedding's sqrt(d), a temperature) stays virtual."""
    div = eqn.primitive.name == "div"
    w, c = (ins[0], ins[1]) if is_virtual(ins[0]) else (ins[1], ins[0])
    if is_virtual(c) or jnp.ndim(c) != 0 or (div and w is not ins[0]):
        return None
    out = w.kind.times(w, lambda x: x / c.astype(x.dtype) if div else x * jnp.asarray(c).astype(x.dtype))
    return None if out is None else [out]


@rule("concatenate", "pad", "stack")
def join(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """Formed in full. Under observation, parameters written side by side are watched on through the whole."""
    pieces = ins[:1] if eqn.primitive.name == "pad" else ins
    if not all(is_virtual(x) and x.kind.watches and not x.is_row for x in pieces):
        return None
    (whole,) = _compat.bind(eqn, [interpreter.dense(x, eqn.primitive.name) for x in ins])
    if eqn.primitive.name == "stack":  # adds a dimension, which shows none of the pieces' atoms
        at = eqn.params["axis"]
        pieces = [x.replace(dims=(*x.dims[:at], (), *x.dims[at:])) for x in pieces]
    return [pieces[0].kind.joined(pieces, whole)]
