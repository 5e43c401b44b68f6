"""Factors of one Flax parameter as the factors PEFT stores, and back; every move is exact.

Ours, over named axes (see `lora_jax.sites`): A (*lead, *in, r), B (*lead, r, *out). PEFT's, per torch module:

    linear     A (r, in)               B (out, r)
    embedding  A (r, vocabulary)       B (features, r)
    conv       A (r, in, *window)      B (out, r / groups, 1, ...)
    parameter  A (E*r, in)             B (out, r*E)      3-D `target_parameters`: expert-major, expert-minor

One parameter may be several modules: stacked layers and fused projections are split. Where the two sides cannot
share one A (a fused kernel read from separate modules; a grouped convolution), the exact form is a block
structure of a larger rank with the scale kept.

Factors are numpy arrays. Those of linear layers may be jax or torch arrays as well, as long as no blocks are needed
(`Placement.is_plain`): then no values leave their device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lora_jax.sites import LORA_BIAS, Atom, Site

from .arrays import kind_of, ops_of

RANK = "rank"
Axis = Atom | str


@dataclass(frozen=True)
class Placement:
    """Where one site goes in PyTorch.

    **Fields:**

    - `names`: dotted modules (with the parameter's name for kind `"parameter"`), row-major over `split`.
    - `kind`: `"linear"`, `"embedding"`, `"conv"` or `"parameter"`.
    - `split`: the axes whose every index is a module of its own; lead axes, or out axes of a fused kernel.
    - `inner`, `outer`: the site's in and remaining out axes, in the order in which torch flattens them.
    - `heads`: modules that use an embedding's table as their tied weight, and so need the same adapter.
    """

    site: Site
    names: tuple[str, ...]
    kind: str
    split: tuple[Atom, ...]
    inner: tuple[Atom, ...]
    outer: tuple[Atom, ...]
    heads: tuple[str, ...] = ()

    @property
    def experts(self) -> tuple[Atom, ...]:
        """Lead axes that stay inside one torch tensor."""
        return tuple(atom for atom in self.site.atoms_of("l") if atom not in self.split)

    @property
    def is_plain(self) -> bool:
        """Whether each torch module is a linear layer with factors of its own, which only change their axes."""
        return self.kind == "linear" and set(self.split) <= set(self.site.atoms_of("l"))

    @property
    def groups(self) -> int:
        return self.site.groups if self.kind == "conv" else 1

    @property
    def a_rest(self) -> tuple[int, ...]:
        """PEFT's A without its rank axis."""
        sizes = tuple(atom.size for atom in self.inner)
        if self.kind == "conv":
            return (sizes[0] * self.groups, *sizes[1:])
        return (math.prod(sizes) // self.site.group,)

    @property
    def out_size(self) -> int:
        return math.prod(atom.size for atom in self.outer)


@dataclass(frozen=True, eq=False)
class Factors:
    """PEFT's factors of one module and `scale`, which multiplies their product.

    `vectors`: what is trained beside them, one number for each output, by the name of its leaf here.
    """

    a: Any
    b: Any
    scale: float
    experts: int = 1
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return (self.a, self.b, *self.vectors.values())


def to_modules(
    place: Placement, a: np.ndarray, b: np.ndarray, vectors: Mapping[str, np.ndarray] | None = None
) -> dict[str, Factors]:
    """The factors of every module of one site in the dtypes given; views where that is possible."""
    site = place.site
    vector_axes: tuple[Axis, ...] = (*site.atoms_of("l"), *site.atoms_of("o"))
    a_axes: tuple[Axis, ...] = (*site.atoms_of("l"), *site.atoms_of("i"), RANK)
    b_axes: tuple[Axis, ...] = (*site.atoms_of("l"), RANK, *site.atoms_of("o"))
    out: dict[str, Factors] = {}
    for name, index in zip(place.names, np.ndindex(*(atom.size for atom in place.split)), strict=True):
        at = dict(zip(place.split, index, strict=True))
        down = take(a, a_axes, at, (*place.experts, RANK, *place.inner))
        up = take(b, b_axes, at, (*place.outer, RANK, *place.experts))
        if place.kind == "conv":
            factors = _conv_out(down, up.reshape(place.out_size, site.rank), place.groups, site.scale)
        else:
            count = math.prod(atom.size for atom in place.experts)
            rows, columns = count * site.rank, math.prod(place.a_rest)
            factors = Factors(down.reshape(rows, columns), up.reshape(place.out_size, rows), site.scale, count)
        own = {n: take(v, vector_axes, at, place.outer).reshape(-1) for n, v in (vectors or {}).items()}
        out[name] = replace(factors, vectors=own)
    return out


def fold(b: np.ndarray, by: float, name: str) -> np.ndarray:
    """`by * b`, rounded once to the dtype of `b`. **Raises** `ValueError` where that is beyond the dtype."""
    with np.errstate(over="ignore"):
        out = (b.astype(np.float64) * by).astype(b.dtype)
    if not np.array_equal(np.isfinite(out), np.isfinite(b)):
        raise ValueError(
            f"{name}: lora_B times {by:g} is beyond {b.dtype.name}; use float32 factors, "
            "`jax.tree.map(lambda x: x.astype('float32'), adapter)`, or `dtype='float32'` on load"
        )
    return out


def tied(factors: Factors) -> Factors:
    """The factors of a linear head that uses the table of an embedding: the same product, transposed."""
    return replace(factors, a=factors.b.T, b=factors.a.T)


@dataclass(frozen=True, eq=False)
class Joined:
    """Our factors of one site: arrays of `site.a_shape`, `site.b_shape` at rank `rank`; of `site.vector_shape`."""

    a: Any
    b: Any
    rank: int
    scale: float
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)


def from_modules(place: Placement, modules: Mapping[str, Factors]) -> Joined:
    """The inverse of `to_modules`, also for factors that PEFT made.

    Modules of unequal rank are padded with zeros; unequal scales are folded into B against the first one.
    Fused out axes whose modules have different A become blocks of a common rank.

    **Raises:** `ValueError` for a grouped convolution whose A mixes the groups.
    """
    site = place.site
    scale = next((modules[n].scale for n in place.names if modules[n].scale != 0), 0.0)
    pieces = [_inward(place, n, modules[n], scale) for n in place.names]
    lead = tuple(atom for atom in place.split if atom in site.atoms_of("l"))
    fused = tuple(atom for atom in place.split if atom not in lead)
    # Sort the pieces by (lead index, out index); `split` may interleave them.
    grid = np.empty([atom.size for atom in place.split], dtype=object)
    for index, piece in zip(np.ndindex(*grid.shape), pieces, strict=True):
        grid[index] = piece
    grid = grid.transpose([place.split.index(atom) for atom in (*lead, *fused)])
    rows = grid.reshape(math.prod(a.size for a in lead), -1)
    layers = [_fuse(list(row)) for row in rows]
    rank = max(a.shape[-1] for a, _ in layers)
    # One array over (lead..., experts..., in..., r) and (lead..., experts..., r, fused..., out...).
    ops = ops_of(kind_of(layers[0][0]))
    a = ops.stack([_pad(x, -1, rank) for x, _ in layers])
    b = ops.stack([_pad(x, len(place.experts), rank) for _, x in layers])
    sizes = [atom.size for atom in lead]
    a = a.reshape(*sizes, *a.shape[1:])
    inner_shape = b.shape[1 : 1 + len(place.experts) + 1]
    b = b.reshape(*sizes, *inner_shape, *(x.size for x in fused), *(x.size for x in place.outer))
    a = take(a, (*lead, *place.experts, *place.inner, RANK), {}, (*site.atoms_of("l"), *site.atoms_of("i"), RANK))
    b = take(
        b, (*lead, *place.experts, RANK, *fused, *place.outer), {}, (*site.atoms_of("l"), RANK, *site.atoms_of("o"))
    )
    return Joined(a, b, rank, scale, _join_vectors(place, modules, scale))


def _join_vectors(place: Placement, modules: Mapping[str, Factors], scale: float) -> dict[str, np.ndarray]:
    """The vectors of all modules as arrays of `site.vector_shape`."""
    out = {}
    for vector in modules[place.names[0]].vectors:
        values = [modules[name].vectors[vector] for name in place.names]
        if vector == LORA_BIAS:  # which the scale multiplies as it does B
            scales = [modules[name].scale for name in place.names]
            values = [
                v if s == scale else fold(v, s / scale, n) for v, s, n in zip(values, scales, place.names, strict=True)
            ]
        sizes = [atom.size for atom in (*place.split, *place.outer)]
        whole = ops_of(kind_of(values[0])).stack(values).reshape(sizes)
        out[vector] = take(
            whole, (*place.split, *place.outer), {}, (*place.site.atoms_of("l"), *place.site.atoms_of("o"))
        )
    return out


def _inward(place: Placement, name: str, found: Factors, scale: float) -> tuple[Any, Any]:
    """One module's factors as (experts..., in..., r) and (experts..., r, out) at the common scale."""
    a, b = found.a, found.b
    ops = ops_of(kind_of(a))
    if found.scale != scale:
        b = fold(b, found.scale / scale, name)
    counts, inner = [x.size for x in place.experts], [x.size for x in place.inner]
    inner = inner if place.site.group == 1 else [*place.a_rest]
    if place.kind == "conv":
        a, b = _conv_in(a, b.reshape(b.shape[:2]), place.groups, name)
    rank = a.shape[0] // math.prod(counts)
    e, r, i = len(counts), 1, len(inner)
    a = a.reshape(*counts, rank, *inner)
    a = ops.transpose(a, (*range(e), *range(e + r, e + r + i), e))
    b = b.reshape(place.out_size, rank, *counts)
    return a, ops.transpose(b, (*range(2, 2 + e), 1, 0))


def _fuse(pieces: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Pieces that share an input, as one A and a B over (experts..., r, piece, out)."""
    first, last = pieces[0]
    if len(pieces) == 1:
        return first, last.reshape(*last.shape[:-1], 1, last.shape[-1])
    if all(a.shape == first.shape and np.array_equal(a, first) for a, _ in pieces):
        return first, np.stack([b for _, b in pieces], axis=-2)
    ranks = [a.shape[-1] for a, _ in pieces]
    total, at = sum(ranks), np.cumsum([0, *ranks])
    b = np.zeros((*last.shape[:-2], total, len(pieces), last.shape[-1]), last.dtype)
    for n, (_, piece) in enumerate(pieces):
        b[..., at[n] : at[n + 1], n, :] = piece
    return np.concatenate([a for a, _ in pieces], axis=-1), b


def _conv_out(a: np.ndarray, b: np.ndarray, groups: int, scale: float) -> Factors:
    """A (r, in/g, *window) and B (out, r) as PEFT's, whose A sees all channels and whose B has `groups`.

    PEFT gives each group its own slice of rank/g rows of A: g copies of ours, each zero outside its group.
    """
    rank, per_group, *window = a.shape
    wide = np.zeros((groups, rank, groups, per_group, *window), a.dtype)
    for g in range(groups):
        wide[g, :, g] = a
    wide = wide.reshape(groups * rank, groups * per_group, *window)
    return Factors(wide, b.reshape(*b.shape, *(1 for _ in window)), scale)


def _conv_in(a: np.ndarray, b: np.ndarray, groups: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's convolution factors as A (r, in/g, *window) and B (out, r) shared by all groups."""
    if groups == 1:
        return a, b
    rank, channels, *window = a.shape
    blocks = a.reshape(groups, rank // groups, groups, channels // groups, *window)
    own = np.stack([blocks[g, :, g] for g in range(groups)])
    if np.count_nonzero(blocks) != np.count_nonzero(own):
        raise ValueError(
            f"{name}: PEFT's lora_A of a convolution with {groups} groups reads channels of every group, which no "
            "change of the grouped kernel can express"
        )
    if all(np.array_equal(block, own[0]) for block in own):
        return own[0], b
    # Different A per group: all of them, and B zero for the groups a row does not belong to.
    split = b.reshape(groups, -1, rank // groups)
    wide = np.zeros((groups, split.shape[1], groups, rank // groups), b.dtype)
    for g in range(groups):
        wide[g, :, g] = split[g]
    return own.reshape(rank, channels // groups, *window), wide.reshape(b.shape[0], rank)


def take(array: np.ndarray, axes: Sequence[Axis], at: Mapping[Any, int], order: Sequence[Axis]) -> np.ndarray:
    """`array` with the axes in `at` indexed away and the others in `order`."""
    rest = [axis for axis in axes if axis not in at]
    kept = array[tuple(at.get(axis, slice(None)) for axis in axes)]
    return ops_of(kind_of(kept)).transpose(kept, tuple(rest.index(axis) for axis in order))


def _pad(array: Any, axis: int, size: int) -> Any:
    missing = [(0, 0)] * array.ndim
    missing[axis] = (0, size - array.shape[axis])
    return np.pad(array, missing) if missing[axis][1] else array
