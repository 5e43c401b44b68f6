"""What must hold between a state dict and a parameter tree before the first value moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .arrays import Kind, same_bits, shape_dtype
from .patterns import Pattern
from .problems import Problems
from .resolve import Entry

# PyTorch's BatchNorm counts its batches; Flax's has no such variable.
_ALWAYS_IGNORED = ("**.num_batches_tracked",)


def compare_shapes(
    ours: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, tuple[int, ...]],
    ignore: Sequence[str],
    problems: Problems,
    known: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Notes names of `ours` that `theirs` lacks (missing), the reverse (unexpected), and unequal shapes."""
    ignored = [Pattern(text) for text in (*_ALWAYS_IGNORED, *ignore)]
    for name, shape in ours.items():
        if name not in theirs:
            problems.missing[name] = f" {shape}"
        elif theirs[name] != shape:
            problems.misshapen[name] = f" is {theirs[name]}, but the parameters make {shape}"
    for name, shape in theirs.items():
        if name not in ours and name not in known and not any(p.match(name) is not None for p in ignored):
            problems.unexpected[name] = f" {shape}"
    problems.suggest(problems.unexpected, problems.missing or ours)


def check_ties(tied: Mapping[str, str] | None, problems: Problems) -> dict[str, str]:
    ties = dict(tied or {})
    for alias, source in ties.items():
        if source in ties:
            problems.other.append(
                f"tied: {alias} -> {source}, which is an alias itself; name its source {ties[source]}"
            )
    return {alias: source for alias, source in ties.items() if source not in ties}


def broken_tie(alias: str, source: str) -> str:
    return (
        f"tied: {alias} and {source} differ; if they were trained apart leave the tie out of `tied`, and give the "
        "Flax model an untied head"
    )


def check_dtypes(
    entries: Sequence[Entry], stored: Mapping[str, Any], dtype: str, kind: Kind, problems: Problems
) -> None:
    for entry in entries:
        present = [name for name in entry.names if name in stored]
        found = {name: shape_dtype(stored[name])[1] for name in present}
        if dtype == "same":
            for name, have in found.items():
                if have != entry.leaf.dtype:
                    problems.other.append(
                        f"{name} is {have.name}, {'.'.join(entry.leaf.path)} is {entry.leaf.dtype.name}; pass "
                        "dtype='like' to cast, or dtype='stored' to keep what is stored"
                    )
        elif dtype == "stored" and len(set(found.values())) > 1:
            both = ", ".join(f"{name} {have.name}" for name, have in found.items())
            problems.other.append(f"{'.'.join(entry.leaf.path)} joins tensors of several dtypes ({both}); use 'like'")
        result = {entry.leaf.dtype} if dtype == "like" else set(found.values())
        for have in result if kind == "jax" else ():
            if jax.dtypes.canonicalize_dtype(have) != have:
                problems.other.append(
                    f"{entry.names[0]}: jax keeps no {np.dtype(have).name} unless jax_enable_x64 is set; pass "
                    "dtype='like' with a narrower `like`, or kind='numpy'"
                )


def hint_ties(problems: Problems, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """An unexpected tensor that equals an expected one is most likely tied to it."""
    for name in problems.unexpected:
        value = stored[name]
        if len(shape_dtype(value)[0]) < 1:
            continue
        for other in wanted:
            if other in stored and other != name and same_bits(value, stored[other]):
                problems.unexpected[name] += f"; equals {other}: pass tied={{{name!r}: {other!r}}}"
                break
