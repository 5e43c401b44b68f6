"""What must hold between a state dict and a parameter tree before the first value moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    if prefix := _wrapper(theirs, problems):
        problems.other.append(
            f"every name starts with `{prefix}`, which the names of the parameters lack: take it off, "
            f"`{{name.removeprefix({prefix!r}): value for name, value in state_dict.items()}}`"
        )


def _wrapper(theirs: Iterable[str], problems: Problems) -> str:
    """What stands before every name (`module.`, `_orig_mod.`, ...), if without it nothing would be missing."""
    unexpected = set(problems.unexpected)
    for name in itertools.islice(problems.missing, 1):
        for prefix in {other.removesuffix(name) for other in unexpected if other.endswith(f".{name}")}:
            bare = {other.removeprefix(prefix) for other in unexpected if other.startswith(prefix)}
            if all(other.startswith(prefix) for other in theirs) and bare >= set(problems.missing):
                return prefix
    return ""


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
        elif dtype == "like":
            for name, have in found.items():
                if _loses_its_kind(have, entry.leaf.dtype):
                    problems.other.append(
                        f"{name} is {have.name}, {'.'.join(entry.leaf.path)} is {entry.leaf.dtype.name}, which would "
                        "cut off a part of each number; give `like` the dtype that is meant"
                    )
        result = {entry.leaf.dtype} if dtype == "like" else set(found.values())
        for have in result:
            problems.other += kept_by(kind, entry.names[0], have, "pass dtype='like' with a narrower `like`")


def kept_by(kind: Kind, name: str, dtype: np.dtype, instead: str) -> list[str]:
    """What is wrong with making a tensor of `dtype` an array of `kind`."""
    if kind != "jax" or jax.dtypes.canonicalize_dtype(dtype) == dtype:
        return []
    return [f"{name}: jax keeps no {dtype.name} unless jax_enable_x64 is set; {instead}, or kind='numpy'"]


def _loses_its_kind(have: np.dtype, want: np.dtype) -> bool:
    """Whether a cast drops fractions or imaginary parts."""
    order = [jnp.integer, jnp.floating, jnp.complexfloating]
    ranks = [next((n for n, kind in enumerate(order) if jnp.issubdtype(x, kind)), -1) for x in (have, want)]
    return ranks[0] > ranks[1] and ranks[0] > 0


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
