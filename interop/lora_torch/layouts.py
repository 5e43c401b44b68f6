"""How the axes of one Flax array become one or several PyTorch tensors, as a small invertible notation.

A layout reads like einops: `"d n h -> (n h) d"` takes a DenseGeneral kernel (features, heads, head size) to a
Linear weight (heads * head size, features). The left side names every axis of the Flax array, the right side
every axis of the PyTorch tensor:

    (n h)    axes merged, row-major
    ...      any run of axes, kept apart: "... i o -> o i ..." is a convolution of any rank
    ~k       axis k reversed, `~...` every axis of the run (ConvTranspose stores its taps in the opposite order)

An axis that is absent on the right is **split**: each of its indices becomes a tensor of its own. A fused
key-value kernel `(2, K, D, H)` is `"s k d h -> (k h) d"`, two tensors.

Only axis lengths of one array are needed to run a layout in either direction, so nothing here knows names.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Ops

SAME = "... -> ..."
LINEAR = "i o -> o i"
CONV = "... i o -> o i ..."
CONV_TRANSPOSE = "... i o -> i o ~..."
HEADS_IN = "d n h -> (n h) d"
HEADS_OUT = "n h d -> d (n h)"
HEADS_FIRST = "n d h -> (n h) d"
HEADS_BIAS = "n h -> (n h)"

# Short names accepted wherever a layout is: `layouts={"encoder.*.kernel": "linear"}`.
NAMED = {
    "same": SAME,
    "linear": LINEAR,
    "conv": CONV,
    "conv_transpose": CONV_TRANSPOSE,
    "heads_in": HEADS_IN,
    "heads_out": HEADS_OUT,
    "heads_first": HEADS_FIRST,
    "heads_bias": HEADS_BIAS,
}

_TOKEN = re.compile(r"\s*(\(|\)|~?\.\.\.|~?[A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Layout:
    """A parsed layout. Build it with `Layout.parse`.

    **Fields:** `spec` as written; `left`, the axis names in order; `right`, one tuple of axis names for each
    PyTorch axis; `reversed_axes`, the names written with `~`.
    """

    spec: str
    left: tuple[str, ...]
    right: tuple[tuple[str, ...], ...]
    reversed_axes: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Parses a notation or one of the `NAMED` layouts.

        **Raises:** `ValueError` for a malformed notation: no or several arrows, an axis named twice, an axis on
        the right that is missing on the left, unbalanced or nested parentheses.
        """
        spec = NAMED.get(text, text)
        sides = spec.split("->")
        if len(sides) != 2:
            raise ValueError(
                f"layout {text!r} is neither one of {sorted(NAMED)} nor of the form 'i o -> o i' with one arrow"
            )
        left_groups, left_reversed = _parse_side(sides[0], text)
        right, reversed_axes = _parse_side(sides[1], text)
        if left_reversed or any(len(group) != 1 for group in left_groups):
            raise ValueError(f"layout {text!r}: the left side takes plain axis names, no '(', ')' or '~'")
        left = tuple(group[0] for group in left_groups)
        flat = [axis for group in right for axis in group]
        for side, axes in (("left", list(left)), ("right", flat)):
            twice = sorted({axis for axis in axes if axes.count(axis) > 1})
            if twice:
                raise ValueError(f"layout {text!r}: {twice} named twice on the {side} side")
        unknown = [axis for axis in flat if axis not in left]
        if unknown:
            raise ValueError(f"layout {text!r}: {unknown} on the right side but not on the left")
        if "..." in left and ("...",) not in right:
            raise ValueError(f"layout {text!r}: '...' can be neither split nor merged; name its axes one by one")
        return cls(spec, left, right, reversed_axes)

    @property
    def split(self) -> tuple[str, ...]:
        """Axes whose every index becomes a tensor of its own, in the order of the left side."""
        kept = {axis for group in self.right for axis in group}
        return tuple(axis for axis in self.left if axis not in kept)

    def accepts(self, ndim: int) -> bool:
        """Whether an array of `ndim` axes can have this layout."""
        named = sum(axis != "..." for axis in self.left)
        return ndim >= named if "..." in self.left else ndim == named

    def bind(self, shape: tuple[int, ...], stack_axes: tuple[int, ...] = ()) -> BoundLayout:
        """Fixes the layout to the shape of one Flax array.

        **Arguments:**

        - `shape`: the whole array, stacked axes included.
        - `stack_axes`: for each enclosing stack of layers, outermost first, the axis it adds (each is a
            position in the array that the stack inside it produced). They are split before the layout's own.

        **Raises:** `ValueError` if the number of axes does not fit.
        """
        base = len(shape) - len(stack_axes)
        if not self.accepts(base):
            raise ValueError(f"layout '{self.spec}' does not describe an array of {base} axes, shape {shape}")
        run = base - sum(axis != "..." for axis in self.left)
        expand = {"...": tuple(f"...{n}" for n in range(run))}
        left = [name for axis in self.left for name in expand.get(axis, (axis,))]
        right = list(self.right)
        if ("...",) in right:
            at = right.index(("...",))
            right[at : at + 1] = [(name,) for name in expand["..."]]
        flipped = {name for axis in self.reversed_axes for name in expand.get(axis, (axis,))}
        stacks = [f"stack {n}" for n in range(len(stack_axes))]
        for name, axis in reversed(list(zip(stacks, stack_axes, strict=True))):
            if not 0 <= axis <= len(left):
                raise ValueError(f"stack axis {axis} does not exist in an array of shape {shape}")
            left.insert(axis, name)
        position = {name: at for at, name in enumerate(left)}
        split = stacks + [name for name in left if name in self.split]
        kept = [name for group in right for name in group]
        return BoundLayout(
            spec=self.spec,
            shape=tuple(shape),
            order=tuple(position[name] for name in (*split, *kept)),
            split_shape=tuple(shape[position[name]] for name in split),
            torch_shape=tuple(math.prod(shape[position[name]] for name in group) for group in right),
            flips=tuple(at for at, name in enumerate(kept) if name in flipped),
        )


@dataclass(frozen=True)
class BoundLayout:
    """A layout of one array.

    **Fields:**

    - `shape`: the Flax array. `torch_shape`: each PyTorch tensor.
    - `split_shape`: lengths of the split axes; `math.prod` of it is the number of tensors.
    - `order`: the Flax axes in the order (split..., kept...), kept as they lie in the PyTorch tensor.
    - `flips`: positions among the kept axes that are reversed.
    """

    spec: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    split_shape: tuple[int, ...]
    torch_shape: tuple[int, ...]
    flips: tuple[int, ...]

    @property
    def _kept_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.order[len(self.split_shape) :])

    def same_result(self, other: BoundLayout) -> bool:
        """Whether both layouts move every element of this shape to the same place."""

        def key(layout: BoundLayout) -> tuple[Any, ...]:
            cut = len(layout.split_shape)
            kept = tuple(axis for axis in layout.order[cut:] if layout.shape[axis] > 1)
            flips = tuple(layout.order[cut + at] for at in layout.flips if layout._kept_shape[at] > 1)
            split = tuple(axis for axis in layout.order[:cut] if layout.shape[axis] > 1)
            return (layout.shape, layout.split_shape, layout.torch_shape, split, kept, flips)

        return key(self) == key(other)

    def to_torch(self, array: Any, ops: Ops, contiguous: bool = True) -> list[Any]:
        """The PyTorch tensors of one Flax array, row-major over the split axes; views of it if not `contiguous`."""
        cut = len(self.split_shape)
        split_axes, kept_axes = self.order[:cut], self.order[cut:]
        rank = {axis: at for at, axis in enumerate(sorted(kept_axes))}
        perm = tuple(rank[axis] for axis in kept_axes)
        pieces = []
        for index in np.ndindex(*self.split_shape):
            at: list[Any] = [slice(None)] * len(self.shape)
            for axis, position in zip(split_axes, index, strict=True):
                at[axis] = position
            piece = ops.transpose(array[tuple(at)] if cut else array, perm)
            piece = ops.flip(piece, self.flips) if self.flips else piece
            piece = ops.reshape(piece, self.torch_shape)
            pieces.append(ops.contiguous(piece) if contiguous else piece)
        return pieces

    def from_torch(self, pieces: list[Any], ops: Ops) -> Any:
        """The exact inverse of `to_torch`. `pieces` must have `torch_shape` each, and be as many."""
        kept = [ops.reshape(piece, self._kept_shape) for piece in pieces]
        kept = [ops.flip(piece, self.flips) for piece in kept] if self.flips else kept
        whole = ops.stack(kept) if self.split_shape else kept[0]
        whole = ops.reshape(whole, (*self.split_shape, *self._kept_shape))
        inverse = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return ops.contiguous(ops.transpose(whole, inverse))


def _parse_side(text: str, spec: str) -> tuple[tuple[tuple[str, ...], ...], frozenset[str]]:
    groups: list[tuple[str, ...]] = []
    flipped: set[str] = set()
    inside: list[str] | None = None
    rest = text.strip()
    while rest:
        match = _TOKEN.match(rest)
        if match is None:
            raise ValueError(f"layout {spec!r}: cannot read {rest!r}; write axis names, '(', ')', '...' or '~axis'")
        token, rest = match.group(1), rest[match.end() :].strip()
        if token == "(":
            if inside is not None:
                raise ValueError(f"layout {spec!r}: parentheses cannot be nested")
            inside = []
        elif token == ")":
            if inside is None:
                raise ValueError(f"layout {spec!r}: ')' without '('")
            groups.append(tuple(inside))
            inside = None
        else:
            axis = token.removeprefix("~")
            if token != axis:
                flipped.add(axis)
            if inside is None:
                groups.append((axis,))
            else:
                inside.append(axis)
    if inside is not None:
        raise ValueError(f"layout {spec!r}: '(' is never closed")
    return tuple(groups), frozenset(flipped)
