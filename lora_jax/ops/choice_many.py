"""Whether kernels compute a product of rows that have an adapter each, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax import _compat
from lora_jax.ops.choice import Choice, record, why_not
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.families import FAMILIES, many_kernels
from lora_jax.ops.matrices import Matrices, as_matrices

FUSED = "fused"


def choose_many(
    spec: Contraction,
    sizes: Mapping[Any, int],
    x: Any,
    w: Any,
    selection: str | None,
    *,
    dropped: bool,
    name: str,
) -> Choice:
    """A family, or XLA with the reasons. `spec`, `sizes` and `x` are those of all rows, which come first in `x`.

    **Raises:** `ValueError` with the reason where `selection` is "fused" and no kernels can run.
    """
    matrices, runs = as_matrices(spec, sizes), x.shape[0]
    reasons: dict[str, str] = {}
    for each in FAMILIES:
        if selection not in (None, FUSED):
            reasons[each] = f"`selection={selection!r}` was asked for"
            continue
        why = _why_not(each, spec, matrices, runs, x, w, dropped, by_name=selection == FUSED)
        if why is None:
            assert isinstance(matrices, Matrices), matrices
            reason = f"{each} can run, with the factors of {runs} row{'s' * (runs > 1)}"
            return record(Choice(each, {"xla": reason, **reasons}, matrices, name, sizes=matrices.mknr))
        reasons[each] = why
    if selection == FUSED:
        of, told = f" of `{name}`" if name else "", "; ".join(f"{each}: {why}" for each, why in reasons.items())
        raise ValueError(f'`selection="fused"` can\'t run the product{of} {x.shape} x {w.shape}. {told}. Use None.')
    mknr = matrices.mknr if isinstance(matrices, Matrices) else None
    return record(Choice("xla", reasons, name=name, sizes=mknr))


def refuse_fused(what: str, selection: str | None, name: str) -> None:
    """**Raises:** `ValueError` where "fused" was asked for, of what has no kernels."""
    if selection == FUSED:
        raise ValueError(f'`selection="fused"` can\'t run `{name}`: {what}. Use None.')


def _why_not(
    each: str, spec: Contraction, matrices: Matrices | str, runs: int, x: Any, w: Any, dropped: bool, by_name: bool
) -> str | None:
    family = FAMILIES[each]
    if family.many is None:
        return "has no kernels for an adapter of each row"
    if dropped:
        return "its kernels for an adapter of each row have no dropout"
    # Where one adapter is faster by XLA, several are.
    if why := why_not(each, family, spec, matrices, x, w, dropped, by_name):
        return why
    if "explicit" in _compat.mesh_axis_kinds(x):
        return "the mesh has explicit axes, over which the factors of each row can't be gathered unsplit"
    assert isinstance(matrices, Matrices)
    return many_kernels(each).unsupported(*matrices.mknr, runs, x.dtype)
