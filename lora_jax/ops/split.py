"""Which axes of a product are split over which axes of a mesh, and what a device has to do about it.

Rows may be split (data and sequence parallel), kept axes of the weight (column parallel) and summed ones (row
parallel); the rank is not. A device works on its own part and adds up over the mesh what it saw only part of.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.ops.contract import Axes


@dataclass(frozen=True)
class Split:
    """`over`: for each split axis of the product, the mesh axes; `parts`: into how many parts."""

    over: Mapping[Hashable, tuple[str, ...]]
    parts: Mapping[Hashable, int]

    def spec(self, axes: Axes) -> PartitionSpec:
        return PartitionSpec(*(self.over.get(name) for name in axes))

    def mesh_axes(self, axes: Axes) -> tuple[str, ...]:
        # Axes that are split alike name the same ones.
        return tuple(dict.fromkeys(over for name in axes for over in self.over.get(name, ())))

    def add(self, x: jax.Array, axes: Axes) -> jax.Array:
        """The sum over the devices that hold other parts of `axes`."""
        over = self.mesh_axes(axes)
        return lax.psum(x, over) if over else x

    def once(self, x: jax.Array, axes: Axes) -> jax.Array:
        """`x` on the first of the devices whose results `add` sums over `axes`, zeros on the others."""
        over = self.mesh_axes(axes)
        return jnp.where(lax.axis_index(over) == 0, x, jnp.zeros_like(x)) if over else x

    def origin(self, axes: Axes, shape: Sequence[int]) -> tuple[Any, ...]:
        """Where this device's part of an array begins, of which it has `shape`."""
        return tuple(
            lax.axis_index(self.over[name]) * n if name in self.over else 0 for name, n in zip(axes, shape, strict=True)
        )

    def whole(self, axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(n * self.parts.get(name, 1) for name, n in zip(axes, shape, strict=True))


NOT_SPLIT = Split({}, {})


def split_of(
    size: Mapping[Hashable, int], mesh: Mapping[str, int], *wishes: tuple[Axes, Any], alike: Sequence[Axes] = ()
) -> Split:
    """The split that moves least, of operands whose `(axes, spec)` are `wishes`, first come first served.

    An axis of the mesh is used once: a weight split over the mesh axis that splits the rows is gathered, as under fully
    sharded data parallelism. Parts must be of equal size. `size`: of each axis that may be split; `alike`: of those
    that are in no operand together, which are split over the same axes of the mesh or not at all.
    """
    over, parts, used = {}, {}, set()
    siblings = {name: names for names in alike for name in names}
    for axes, spec in wishes:
        for name, entry in zip(axes, spec, strict=False):
            wanted = (entry,) if isinstance(entry, str) else tuple(entry or ())
            wanted = tuple(axis for axis in wanted if mesh[axis] > 1)
            count = math.prod(mesh[axis] for axis in wanted)
            every = siblings.get(name, (name,))
            if not wanted or name not in size or name in over or used & {*wanted}:
                continue
            if all(size[each] % count == 0 for each in every):
                over |= dict.fromkeys(every, wanted)
                parts |= dict.fromkeys(every, count)
                used |= {*wanted}
    return Split(over, parts)
