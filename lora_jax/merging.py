"""Folding an adapter into its base, and taking it out again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import tracing
from lora_jax.adapters import Adapter, as_adapter
from lora_jax.functional import check_params
from lora_jax.ops.contract import contract
from lora_jax.sites import Site

RANK = "rank"


def merge(params: Any, adapter: Adapter, *, safe: bool = False) -> Any:
    """A copy of `params` with W + s·A·B in place of every adapted W; other leaves are the same objects.

    The sum is computed in float32 (float64 for a float64 base) and rounded once to the base's dtype.

    **Arguments:** `safe` looks at every merged value before it returns any (PEFT's `safe_merge`): a factor that
    diverged, or a sum too large for the base's dtype, is an error. Not under `jit`, where there are no values yet.

    **Raises:** `ValueError` if a leaf is missing or misshapen, or if an adapted leaf's array also stands at
    another path: the two would no longer be one weight; with `safe`, naming every parameter that would not be
    finite. `TypeError` if `adapter` is no `Adapter`.
    """
    merged = _fold(params, adapter, 1.0)
    if safe:
        _refuse_not_finite(merged, adapter)
    return merged


def unmerge(params: Any, adapter: Adapter) -> Any:
    """Takes a merged adapter out again. In half precision the base comes back up to one rounding.

    Nothing in the parameters says what was merged: taking out what was never put in subtracts it all the same.

    **Raises:** as `merge`; and `ValueError` for `modules_to_save`, whose former values are not in the adapter.
    """
    if isinstance(adapter, Adapter) and (full := [site.name for site in adapter.sites if site.is_full]):
        raise ValueError(
            f"cannot unmerge {', '.join(full)}: they were replaced, not added to. Keep the base parameters."
        )
    return _fold(params, adapter, -1.0, "unmerge")


def delta(site: Site, a: Any, b: Any) -> jax.Array:
    """s·A·B of one site in the shape of its parameter, in float32 (float64 for float64 factors)."""
    wide = jnp.promote_types(jnp.promote_types(jnp.asarray(a).dtype, jnp.asarray(b).dtype), jnp.float32)
    lead, inner, outer = site.atoms_of("l"), site.atoms_of("i"), site.atoms_of("o")
    product = contract(
        jnp.asarray(a, wide), (*lead, *inner, RANK), jnp.asarray(b, wide), (*lead, RANK, *outer), site.atoms,
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    return (site.scale * product).reshape(site.shape)


def _fold(params: Any, adapter: Adapter, sign: float, what: str = "merge") -> Any:
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"`{what}` needs an Adapter, which knows ranks and roles, got {type(adapter).__name__}; "
            "wrap a plain tree with `Adapter.from_leaves(leaves, plan.sites)`."
        )
    adapter = as_adapter(adapter, adapter.sites)
    paths, leaves, tree = tracing.flatten_params(params)
    check_params(adapter.sites, {p: x.shape for p, x in zip(paths, leaves, strict=True)})
    _refuse_shared(paths, leaves, adapter)
    sites = {site.path: site for site in adapter.sites}
    return jax.tree.unflatten(
        tree,
        [_folded(leaf, sites.get(path), adapter, sign) for path, leaf in zip(paths, leaves, strict=True)],
    )


def _folded(leaf: Any, site: Site | None, adapter: Adapter, sign: float) -> Any:
    if site is None:
        return leaf
    if site.is_full:
        return jnp.asarray(adapter.leaf(site.path)).astype(leaf.dtype)
    change = delta(site, *adapter.factors(site))
    wide = jnp.promote_types(leaf.dtype, change.dtype)
    return (jnp.asarray(leaf, wide) + sign * change.astype(wide)).astype(leaf.dtype)


def _refuse_not_finite(merged: Any, adapter: Adapter) -> None:
    paths, leaves, _ = tracing.flatten_params(merged)
    adapted = {site.path for site in adapter.sites}
    found = [(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if path in adapted]
    try:
        bad = [".".join(path) for path, leaf in found if not bool(jnp.isfinite(leaf).all())]
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "`safe=True` looks at values, which do not exist under `jax.jit`: merge outside of it."
        ) from error
    if bad:
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise ValueError(
            f"merging would give numbers that are not finite in {', '.join(bad[:4])}{more}: the adapter diverged, or "
            "the base's dtype is too narrow for the sum. Nothing was changed: use an earlier checkpoint or a wider "
            "base."
        )


def _refuse_shared(paths: list[tuple[str, ...]], leaves: list[Any], adapter: Adapter) -> None:
    adapted = {site.path for site in adapter.sites}
    seen: dict[int, list[tuple[str, ...]]] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        seen.setdefault(id(leaf), []).append(path)
    for group in seen.values():
        if len(group) > 1 and adapted & set(group):
            names = ", ".join(f"`{'.'.join(p)}`" for p in group)
            raise ValueError(
                f"{names} are one shared array; merging would make them differ. Keep the adapter unmerged, or "
                "copy the array first if they may differ."
            )
