"""Fixes, for every leaf of a tree, its PyTorch names and its one layout; whatever stays open becomes a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .layouts import BoundLayout
from .naming import Naming, Target
from .problems import Problems
from .trees import Leaf

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Entry:
    """One leaf with everything decided: `names[n]` is the n-th tensor that `layout` makes of it."""

    leaf: Leaf
    names: tuple[str, ...]
    layout: BoundLayout
    part: int | None
    axis: int


def resolve(leaves: Sequence[Leaf], naming: Naming, shapes: Shapes | None, problems: Problems) -> list[Entry]:
    """Decides names and layouts of all leaves.

    **Arguments:** `shapes`, those of the PyTorch tensors by name where they are known. They choose among the
    layouts that the rules leave open, and only if exactly one fits.

    **Returns:** an entry for each leaf that could be decided; the others are in `problems`.
    """
    problems.other += naming.unused([leaf.path for leaf in leaves])
    entries = []
    owners: dict[tuple[str, int | None], Leaf] = {}
    for leaf in leaves:
        entry = _resolve_leaf(leaf, naming, shapes, problems)
        if entry is None:
            continue
        entries.append(entry)
        for name in entry.names:
            other = owners.setdefault((name, entry.part), leaf)
            if other is not leaf:  # a name may hold dots, so only the leaves themselves can be told apart
                one, two = (".".join(each.path) for each in (other, leaf))
                problems.other.append(
                    f"{one} and {two} both become {name}; rename one with `names`, or make them parts of it with "
                    "`Rule(part=…)`"
                )
    return entries


def _resolve_leaf(leaf: Leaf, naming: Naming, shapes: Shapes | None, problems: Problems) -> Entry | None:
    target = naming.target(leaf.path, len(leaf.shape))
    candidates: list[tuple[tuple[str, ...], BoundLayout]] = []
    for layout in target.layouts:
        try:
            bound = layout.bind(leaf.shape, target.stack_axes)
            candidates.append((tuple(target.expand(layout, leaf.shape)), bound))
        except ValueError as error:
            problems.other.append(f"{leaf}: {error}")
            return None
    if not candidates:
        problems.ambiguous[".".join(leaf.path)] = f" {leaf.shape}: no known layout has so many axes"
        return None
    open_ones = _distinct(candidates)
    if len(open_ones) > 1 and shapes is not None:
        absent = [name for name in open_ones[0][0] if name not in shapes]
        if absent and all(names == open_ones[0][0] for names, _ in open_ones):
            for name in absent:
                problems.missing[name] = f", for {leaf}"
            return None
        fitting = [c for c in open_ones if _fits(*c, target, shapes)]
        if not fitting:
            wanted = " or ".join(f"{bound.torch_shape} by '{bound.spec}'" for _, bound in open_ones)
            for name in open_ones[0][0]:
                problems.misshapen[name] = f" is {shapes.get(name)}; {leaf} needs {wanted}"
            return None
        open_ones = fitting
    if len(open_ones) > 1:
        options = ", ".join(f"'{bound.spec}' -> {bound.torch_shape}" for _, bound in open_ones)
        problems.ambiguous[".".join(leaf.path)] = f" {leaf.shape} could be {options}"
        return None
    names, bound = open_ones[0]
    return Entry(leaf, names, bound, target.part, target.axis)


def _distinct(candidates: list[tuple[tuple[str, ...], BoundLayout]]) -> list[tuple[tuple[str, ...], BoundLayout]]:
    """The candidates that differ in what they do to this very shape: axes of length one make many agree."""
    out: list[tuple[tuple[str, ...], BoundLayout]] = []
    for names, bound in candidates:
        if not any(names == other and bound.same_result(seen) for other, seen in out):
            out.append((names, bound))
    return out


def _fits(names: tuple[str, ...], bound: BoundLayout, target: Target, shapes: Shapes) -> bool:
    def one(name: str) -> bool:
        shape = shapes.get(name)
        if shape is None or target.part is None:
            return shape == bound.torch_shape
        others = [n for n in range(len(shape)) if n != target.axis]  # a part says nothing about the joined axis
        return len(shape) == len(bound.torch_shape) and all(shape[n] == bound.torch_shape[n] for n in others)

    return all(one(name) for name in names)
