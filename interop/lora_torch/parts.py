"""PyTorch tensors that several Flax leaves make up, such as the `in_proj_weight` of its MultiheadAttention."""

from __future__ import annotations

from collections.abc import Sequence

from .problems import Problems
from .resolve import Entry


def produced_shapes(entries: Sequence[Entry], problems: Problems) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the entries make up, parts joined."""
    out: dict[str, tuple[int, ...]] = {}
    parts: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        for name in entry.names:
            out[name] = entry.layout.torch_shape
            if entry.part is not None:
                parts.setdefault(name, {})[entry.part] = entry
    for name, by_part in parts.items():
        if sorted(by_part) != list(range(len(by_part))):
            problems.other.append(f"{name}: parts {sorted(by_part)} given; they must be 0, 1, 2 … without a gap")
            continue
        pieces = [by_part[part] for part in sorted(by_part)]
        axis, first = pieces[0].axis, pieces[0].layout.torch_shape
        rest = {(p.axis, len(p.layout.torch_shape), _without(p.layout.torch_shape, axis)) for p in pieces}
        if len(rest) > 1 or not 0 <= axis < len(first):
            described = ", ".join(f"{p.leaf} -> {p.layout.torch_shape} axis {p.axis}" for p in pieces)
            problems.other.append(f"{name}: its parts cannot be joined: {described}")
            continue
        total = sum(p.layout.torch_shape[axis] for p in pieces)
        out[name] = (*first[:axis], total, *first[axis + 1 :])
    return out


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def part_slices(entries: Sequence[Entry]) -> dict[tuple[str, int], slice]:
    """Where each part lies along the joined axis of its tensor."""
    out: dict[tuple[str, int], slice] = {}
    ends: dict[str, int] = {}
    parted = [entry for entry in entries if entry.part is not None]
    for entry in sorted(parted, key=lambda entry: entry.part or 0):
        for name in entry.names:
            start = ends.get(name, 0)
            ends[name] = start + entry.layout.torch_shape[entry.axis]
            out[name, entry.part or 0] = slice(start, ends[name])
    return out
