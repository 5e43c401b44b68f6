"""Which implementation computes a product, and why not another one."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax.kernels import tuning_cache
from lora_jax.kernels.shape_class import class_of
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.families import FAMILIES, Family, group_kernels, kernels
from lora_jax.ops.matrices import Matrices, as_matrices


@dataclass(frozen=True)
class Choice:
    """`print` it: the implementation, and for each other one why it does not run.

    **Fields:**

    - `implementation`: `"xla"` or the name of a family of kernels.
    - `reasons`: `{name: why not}` for the others.
    - `matrices`: the product as one of matrices, where kernels run.
    - `name`: of the parameter, where known.
    - `group`: for one of several products with the same data, whether they share the work on it.
    - `sizes`: M, K, N and R, where the product is one of matrices.
    """

    implementation: str
    reasons: Mapping[str, str]
    matrices: Matrices | None = None
    name: str = ""
    group: str = ""
    sizes: tuple[int, int, int, int] | None = None

    def __str__(self) -> str:
        size = ""
        if self.matrices is not None:
            size = "  M={}, K={}, N={}, R={}".format(*self.matrices.mknr)
            size += ", weight stored (N, K)" if self.matrices.transposed else ""
        lines = [self.implementation + size, *([f"  {self.group}"] if self.group else [])]
        return "\n".join([*lines, *(f"  not {name}: {why}" for name, why in self.reasons.items())])


def names() -> tuple[str, ...]:
    return ("xla", *FAMILIES)


def check_implementation(implementation: str | None) -> None:
    """Raises for a name that no implementation has."""
    if implementation is not None and implementation not in names():
        raise ValueError(
            f"`implementation={implementation!r}` is not available; use None (choose) or one of {names()}."
        )


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collects the choices made for the products that are traced inside the block."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


_records: list[list[Choice]] = []


def choose(
    spec: Contraction,
    sizes: Mapping[Any, int],
    x: Any,
    w: Any,
    implementation: str | None,
    *,
    dropped: bool,
    name: str = "",
) -> Choice:
    """The implementation asked for or, for None, the first family without a reason against it; else XLA.

    `x` and `w`: arrays or abstract values. **Raises:** `ValueError` with the reason where a family is asked for by name
    and can't run.
    """
    return record(_chosen(spec, sizes, x, w, implementation, dropped, name))


class Sharing(enum.Enum):
    """How several products with the same data and the same mask are computed."""

    TOGETHER = "at most one pass over the data gives h of all {count}, one all dA, one product the data's gradient"
    BY_XLA = "one product gives h of all {count}, and one all dA"
    IN_TURN = "the data is read for each of the {count} products: {why}"
    APART = "nothing is shared by the {count} products: {why}"


def choose_group(
    spec: Contraction,
    sizes: Sequence[Mapping[Any, int]],
    x: Any,
    ws: Sequence[Any],
    implementation: str | None,
    *,
    dropped: bool,
) -> tuple[Sharing, list[Choice]]:
    """As `choose` for each of several products of one `x`, and what these share. **Raises:** as `choose` does."""
    choices = [_chosen(spec, size, x, w, implementation, dropped, "") for size, w in zip(sizes, ws, strict=True)]
    first, why = choices[0], ""
    if any(choice.implementation != first.implementation for choice in choices):
        how, why = Sharing.APART, "they don't run on the same implementation"
    elif len({choice.matrices and (choice.matrices.inner, choice.matrices.outer) for choice in choices}) > 1:
        how, why = Sharing.APART, "a kernel of one column is one of another shape"
    elif first.implementation == "xla":
        how = Sharing.BY_XLA
    else:
        why = _why_in_turn(first.implementation, [choice.matrices for choice in choices], x, dropped)
        how = Sharing.IN_TURN if why else Sharing.TOGETHER
    text = how.value.format(count=len(ws), why=why)
    return how, [record(replace(choice, group=text)) for choice in choices]


def _why_in_turn(name: str, products: Sequence[Matrices | None], x: Any, dropped: bool) -> str:
    module = group_kernels(name)
    if module is None:
        return f"{name} has no kernels for several"
    (m, k, _, _), *_ = sizes = [product.mknr for product in products if product is not None]
    ns, ranks = [n for _, _, n, _ in sizes], [rank for *_, rank in sizes]
    if why := module.unsupported(m, k, ns, ranks, x.dtype):
        return why
    return hasattr(module, "slower") and module.slower(m, k, ns, ranks, dropped) or ""


def _chosen(
    spec: Contraction,
    sizes: Mapping[Any, int],
    x: Any,
    w: Any,
    implementation: str | None,
    dropped: bool,
    name: str,
) -> Choice:
    check_implementation(implementation)
    matrices = as_matrices(spec, sizes)
    reasons: dict[str, str] = {}
    chosen = None
    for each, family in FAMILIES.items():
        if implementation not in (None, each):
            reasons[each] = f"`implementation={implementation!r}` was asked for"
        elif chosen is not None:
            reasons[each] = f"{chosen} comes first"
        else:
            why = why_not(each, family, spec, matrices, x, w, dropped, by_name=implementation is not None)
            if why is None:
                chosen = each
            elif implementation == each:
                of = f" of `{name}`" if name else ""
                raise ValueError(
                    f"`implementation={each!r}` can't run the product{of} {tuple(x.shape)} x {tuple(w.shape)}: {why}. "
                    'Use None (choose) or "xla".'
                )
            else:
                reasons[each] = why
    if chosen is None:
        mknr = matrices.mknr if isinstance(matrices, Matrices) else None
        return Choice("xla", reasons, name=name, sizes=mknr)
    assert isinstance(matrices, Matrices)
    why = f"{chosen} can run and comes first"
    if implementation is not None:
        why = f"`implementation={implementation!r}` was asked for"
    elif measured := _measured(chosen, matrices, dropped):
        why = measured[1]
    elif hasattr(module := kernels(chosen), "faster"):
        why = module.faster(*matrices.mknr, dropped, _compat.target_device().kind)
    return Choice(chosen, {"xla": why, **reasons}, matrices, name, sizes=matrices.mknr)


def only_xla(what: str, implementation: str | None, name: str) -> None:
    """Notes the choice of XLA for what no kernel computes. **Raises:** `ValueError` where one was asked for."""
    if implementation not in (None, "xla"):
        raise ValueError(
            f'`implementation={implementation!r}` can\'t run `{name}`: {what}. Use None (choose) or "xla".'
        )
    record(Choice("xla", dict.fromkeys(FAMILIES, what), name=name))


def record(choice: Choice) -> Choice:
    for each in _records:
        each.append(choice)
    return choice


def why_not(
    each: str, family: Family, spec: Contraction, matrices: Matrices | str, x: Any, w: Any, dropped: bool, by_name: bool
) -> str | None:
    """What speaks against a family, or None. `by_name`: speed does not."""
    if why := device_lacks(family):
        return why
    if why := _types(spec, x, w):
        return why
    if isinstance(matrices, str):
        return matrices
    if why := _mesh(x):
        return why
    module = family.load()
    if isinstance(module, str):
        return module
    m, k, n, rank = matrices.mknr
    if why := module.unsupported(m, k, n, rank, x.dtype):
        return why
    if by_name:
        return None
    if (measured := _measured(each, matrices, dropped)) is not None:
        won, words = measured
        return None if won else words
    kind = _compat.target_device().kind
    return module.slower(m, k, n, rank, x.dtype, dropped, kind) if hasattr(module, "slower") else None


def device_lacks(family: Family) -> str | None:
    """Why the device here is none for a family, or None."""
    device = _compat.target_device()
    if device.platform not in family.platforms:
        return f"needs {family.needs}; the platform here is {device.platform}"
    if family.capability is not None:
        least, most = family.capability
        if device.capability is None or not least <= device.capability <= most:
            has = "an unknown compute capability" if device.capability is None else "{}.{}".format(*device.capability)
            return f"needs {family.needs}; {device.kind} has {has}"
    return None


def _measured(each: str, matrices: Matrices, dropped: bool) -> tuple[bool, str] | None:
    """Whether a family won when the user timed such a product on this kind of device, and that in words."""
    m, k, n, rank = matrices.mknr
    shape = class_of(m, k, n, rank, dropped=dropped)
    entry = tuning_cache.find(_compat.target_device().kind, "implementation", shape)
    if entry is None or each not in entry["microseconds"]:
        return None
    times = ", ".join(
        f"{name} {time:.0f}" for name, time in sorted(entry["microseconds"].items(), key=lambda kv: kv[1])
    )
    return entry["winner"] == each, f"microseconds measured for such sizes: {times} ({tuning_cache.path()})"


def _types(spec: Contraction, x: Any, w: Any) -> str | None:
    if x.dtype != w.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes a bfloat16 or float16 weight and data of its dtype, not {x.dtype} data and a {w.dtype} weight"
    if spec.preferred_element_type is not None and spec.preferred_element_type != x.dtype:
        return f"the result is wanted in {jnp.dtype(spec.preferred_element_type)}; the kernels give {x.dtype}"
    precisions = spec.precision if isinstance(spec.precision, tuple) else (spec.precision,)
    if any(p not in (None, lax.Precision.DEFAULT, "default") for p in precisions):
        return f"precision={spec.precision} is asked for; the kernels have the default one only"
    return None


def _mesh(x: Any) -> str | None:
    kinds = set(_compat.mesh_axis_kinds(x))
    if len(kinds) > 1:
        return f"the axes of the mesh are of several kinds here ({', '.join(sorted(kinds))})"
    return None
