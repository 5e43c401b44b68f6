"""A weight that is not an array: the frozen array, factors with named axes, and a view onto both.

The interpreter moves a `Virtual` through structural operations (transpose, reshape, slice, scan ...) without
knowing what the factors mean: each factor axis is named by the `Atom` of the parameter it belongs to, so an
operation on a view's dimension is an operation on the factor axes of the same name. What the factors mean is
the business of the `Kind`, which is asked when the weight meets a contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax import lax

from lora_jax.sites import Atom

Dims = tuple[tuple[Atom, ...], ...]


@dataclass(frozen=True)
class DotGeneral:
    """A product of an array `x` with a weight in terms of named axes; `y` names the result's axes.

    `summed` names the contracted axes in the product's own order.
    `split_x`, `split_w` are the shapes that give every axis its own name; `out_shape` undoes it for `y`.
    """

    x: tuple[Hashable, ...]
    w: tuple[Atom, ...]
    y: tuple[Hashable, ...]
    summed: tuple[Atom, ...]
    split_x: tuple[int, ...]
    split_w: tuple[int, ...]
    out_shape: tuple[int, ...]
    precision: Any
    preferred_element_type: Any
    out_sharding: Any = None

    @property
    def needs_array(self) -> bool:
        """Whether the product keeps a dimension along which the weight only repeats itself."""
        return any(atom.is_repeat and atom not in self.x for atom in self.w)


class Kind(Protocol):
    """What the factors of a `Virtual` mean. Each method returns None where it has no fast path."""

    @property
    def name(self) -> str: ...

    @property
    def watches(self) -> bool:
        """Whether this is a parameter under observation, without values."""
        ...

    @property
    def is_stopped(self) -> bool:
        """Whether this is a parameter under observation behind a `stop_gradient`."""
        ...

    @property
    def is_formed(self) -> bool:
        """Whether this stands for a function of parameters under observation, which applied is an array."""
        ...

    def materialise(self, w: Virtual) -> jax.Array: ...

    def dot_general(self, w: Virtual, x: jax.Array, dot: DotGeneral, key: Any, eqn: Any) -> jax.Array | None: ...

    def conv(self, w: Virtual, x: jax.Array, key: Any, eqn: Any) -> jax.Array | None: ...

    def ragged_dot(self, w: Virtual, x: jax.Array, sizes: jax.Array, key: Any, eqn: Any) -> jax.Array | None: ...

    def gather(self, w: Virtual, picks: Mapping[int, int], indices: jax.Array, eqn: Any) -> jax.Array | Virtual: ...

    def times(self, w: Virtual, factor: Callable[[jax.Array], jax.Array]) -> Virtual | None: ...

    def stopped(self, w: Virtual) -> Virtual: ...

    def undropped(self, w: Virtual) -> Virtual:
        """`w` without dropout."""
        ...

    def follow(self, w: Virtual, eqn: Any, outs: list[Any], alone: bool) -> list[Any]: ...


class Running:
    """What all kinds answer that a model runs with; those that planning observes with have answers of their own."""

    @property
    def watches(self) -> bool:
        return False

    @property
    def is_stopped(self) -> bool:
        return False

    @property
    def is_formed(self) -> bool:
        return False

    def stopped(self, w: Virtual) -> Virtual:
        """The gradient of base and factors was stopped on the way; nothing else changes."""
        return w

    def undropped(self, w: Virtual) -> Virtual:
        return w.replace(key=None)

    def follow(self, w: Virtual, eqn: Any, outs: list[Any], alone: bool) -> list[Any]:
        """Once formed, the weight is an array like any other."""
        return outs


@jax.tree_util.register_pytree_node_class
@dataclass
class Virtual:
    """A view of a weight.

    **Fields:**

    - `base`: the frozen array of this view; `factors`: the kind's arrays by name.
    - `key`: dropout key of the parameter, or None.
    - `dims`: for each dimension of `base`, the atoms it is made of, outermost first.
    - `axes`: for each factor, the names of its axes (atoms, or strings such as the rank's).
    - `sizes`: present sizes of atoms that were sliced.
    - `dropped`: atoms the view no longer shows, each with how it went: `"index"` (static), `"pick"` (by traced
      indices) or `"scan"`.
    - `kind`: what the factors mean.
    """

    base: Any
    factors: dict[str, Any]
    key: Any
    dims: Dims
    axes: tuple[tuple[str, tuple[Hashable, ...]], ...]
    sizes: tuple[tuple[Atom, int], ...]
    dropped: tuple[tuple[Atom, str], ...]
    kind: Kind

    def tree_flatten(self):
        names = tuple(sorted(self.factors))
        children = (self.base, [self.factors[n] for n in names], self.key)
        return children, (names, self.dims, self.axes, self.sizes, self.dropped, self.kind)

    @classmethod
    def tree_unflatten(cls, aux, children) -> Virtual:
        base, factors, key = children
        names, *static = aux
        return cls(base, dict(zip(names, factors, strict=True)), key, *static)

    def replace(self, **changes: Any) -> Virtual:
        return Virtual(**{**{f: getattr(self, f) for f in self.__dataclass_fields__}, **changes})

    @property
    def visible(self) -> tuple[Atom, ...]:
        """Atoms of the view in row-major order."""
        return tuple(atom for dim in self.dims for atom in dim)

    @property
    def own_axes(self) -> set[int]:
        """Axes of the parameter that the view still shows."""
        return {atom.axis for atom in self.visible if atom.axis >= 0}

    @property
    def is_row(self) -> bool:
        """Whether the view is rows picked by traced indices: a looked-up embedding, which is data and no weight."""
        picked = any(how == "pick" and atom.size > 1 for atom, how in self.dropped)
        return picked and len(self.own_axes) <= 1

    def size(self, atom: Atom) -> int:
        return dict(self.sizes).get(atom, atom.size)

    def axes_of(self, factor: str) -> tuple[Hashable, ...]:
        return dict(self.axes)[factor]

    def carriers(self, atom: Atom) -> tuple[str, ...]:
        """Names of the factors that have `atom` among their axes."""
        return tuple(name for name, axes in self.axes if atom in axes)

    def map_axis(self, atom: Atom, fn: Callable[[Any, int], Any]) -> dict[str, Any]:
        """Factors after `fn(array, axis)` on each that carries `atom`."""
        out = dict(self.factors)
        for name in self.carriers(atom):
            out[name] = fn(out[name], self.axes_of(name).index(atom))
        return out

    def sliced(self, base: Any, atom: Atom, size: int, fn: Callable[[Any, int], Any]) -> Virtual:
        """The view after `fn` cut `atom` down to `size`; `base` is the cut base."""
        sizes = {**dict(self.sizes), atom: size}
        return self.replace(base=base, factors=self.map_axis(atom, fn), sizes=tuple(sorted(sizes.items())))

    def without_dims(self, base: Any, dims: tuple[int, ...]) -> Virtual:
        """The view with dimensions of size one removed; their atoms stay behind on the factors."""
        gone = tuple((atom, "index") for d in dims for atom in self.dims[d])
        kept = tuple(dim for d, dim in enumerate(self.dims) if d not in dims)
        return self.replace(base=base, dims=kept, dropped=(*self.dropped, *gone))

    def picked(self, dim: int) -> Virtual:
        """The view after one position of a dimension was picked by a traced index; the dimension stays, as one."""
        gone = tuple((atom, "pick") for atom in self.dims[dim])
        return self.replace(dims=(*self.dims[:dim], (), *self.dims[dim + 1 :]), dropped=(*self.dropped, *gone))

    def repeated(self, places: Sequence[int]) -> Virtual:
        """The view with names for dimensions along which `base` repeats itself: atoms of no factor, of stride 0."""
        lowest = min((atom.axis for atom in self.visible), default=0)
        dims = list(self.dims)
        for n, place in enumerate(places, start=1):
            dims[place] = (Atom(min(lowest, 0) - n, 0, self.base.shape[place]),)
        return self.replace(dims=tuple(dims))

    def split(self, atom: Atom, sizes: tuple[int, ...]) -> tuple[Virtual, tuple[Atom, ...]]:
        """The same view with `atom` replaced by one atom for each of `sizes`, outermost first; and those atoms."""
        parts, stride = [], atom.stride
        for size in reversed(sizes):
            parts.append(Atom(atom.axis, stride, size))
            stride *= size
        new = tuple(reversed(parts))

        def renamed(axes):
            return tuple(n for a in axes for n in (new if a == atom else (a,)))

        def reshaped(x, axis):
            return lax.reshape(x, (*x.shape[:axis], *sizes, *x.shape[axis + 1 :]))

        view = self.replace(
            factors=self.map_axis(atom, reshaped),
            dims=tuple(renamed(dim) for dim in self.dims),
            axes=tuple((name, renamed(axes)) for name, axes in self.axes),
            sizes=tuple((a, s) for a, s in self.sizes if a != atom),
        )
        return view, new

    def live_factor(self, name: str) -> tuple[Any, tuple[Hashable, ...]]:
        """A factor and its axes without the atoms that the view has dropped (all of size one by now)."""
        array, axes, shown = self.factors[name], self.axes_of(name), set(self.visible)
        gone = tuple(i for i, a in enumerate(axes) if isinstance(a, Atom) and a not in shown)
        return (lax.squeeze(array, gone) if gone else array), tuple(a for i, a in enumerate(axes) if i not in gone)


def is_virtual(x: Any) -> bool:
    return isinstance(x, Virtual)
