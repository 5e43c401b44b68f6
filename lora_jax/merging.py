"""Folding an adapter into its base, and taking it out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from lora_jax import tracing
from lora_jax.adapters import Adapter, as_adapter
from lora_jax.functional import check_params
from lora_jax.ops.contract import contract
from lora_jax.sites import LORA_BIAS, MAGNITUDE, TOKENS, Site
from lora_jax.token_rows import with_rows
from lora_jax.weights.norms import magnitude_scale, over_parameter
from lora_jax.weights.norms import norms as low_rank_norms

RANK = "rank"


def merge(params: Any, adapter: Adapter, *, safe: bool = False) -> Any:
    """A copy of `params` with W + s·A·B in place of every adapted W; other leaves are the same objects.

    A bias on B is added to the base's, which has to be there: the layer's `bias`, beside its `kernel` or `weight`.

    With DoRA it is `magnitude / |W + s·A·B|` times that sum, norms being those of the base given here. The sum is
    computed in float32 (float64 for a float64 base) and rounded once to the base's dtype.

    **Arguments:** `safe` looks at every merged value before it returns any (PEFT's `safe_merge`): a factor that
    diverged, or a sum too large for the base's dtype, is an error. Not under `jit`, where there are no values yet.

    **Raises:** `ValueError` if a leaf is missing or misshapen, if a bias on B finds none of the base's to be added to,
    or if an adapted leaf's array also stands at another path: the two would no longer be one weight; with `safe`,
    naming every parameter that would not be finite. `TypeError` if `adapter` is no `Adapter`.
    """
    merged = _fold(params, adapter, _merged)
    if safe:
        _refuse_not_finite(merged, adapter)
    return merged


def unmerge(params: Any, adapter: Adapter, norms: Mapping[str, Any] | None = None) -> Any:
    """Takes a merged adapter out again. In half precision the base comes back up to one rounding.

    Nothing in the parameters says what was merged: taking out what was never put in subtracts it all the same.

    **Arguments:** `norms`: for DoRA, what `weight_norms(params, adapter)` gave before merging. Merged weights have
    the length of their magnitudes, and no longer say what it was.

    **Raises:** as `merge`; and `ValueError` for what was replaced (`modules_to_save`, biases, token rows), whose former
    values are not in the adapter, for DoRA without `norms`, and for a magnitude of 0, which has erased what it
    multiplied.
    """
    if isinstance(adapter, Adapter) and (full := [s.name for s in adapter.sites if not s.is_low_rank]):
        raise ValueError(
            f"cannot unmerge {', '.join(full)}: they were replaced, not added to. Keep the base parameters."
        )
    lengths = dict(norms or {})
    if isinstance(adapter, Adapter) and (lost := [s.name for s in adapter.sites if s.dora and s.name not in lengths]):
        raise ValueError(
            f"cannot unmerge {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}: DoRA replaced the lengths of these "
            "weights. Keep the base parameters, or keep `norms = weight_norms(params, adapter)` before merging and "
            "pass `norms=norms`."
        )

    def unmerged(leaf: Any, site: Site, adapter: Adapter) -> Any:
        return _unmerged(leaf, site, adapter, lengths.get(site.name))

    return _fold(params, adapter, unmerged, "unmerge")


def weight_norms(params: Any, adapter: Adapter) -> dict[str, jax.Array]:
    """`{name: |W + s·A·B| of shape (*lead, *out)}` of the sites with DoRA, in float32: what `unmerge` needs to know.

    **Raises:** `ValueError` if the parameters are not those that the adapter is for.
    """
    paths, leaves, _ = tracing.flatten_params(params)
    check_params(adapter.sites, {p: x.shape for p, x in zip(paths, leaves, strict=True)})
    values = dict(zip(paths, leaves, strict=True))
    return {s.name: low_rank_norms(s, values[s.path], *adapter.factors(s)) for s in adapter.sites if s.dora}


def delta(site: Site, a: Any, b: Any) -> jax.Array:
    """s·A·B of one site in the shape of its parameter, in float32 (float64 for float64 factors)."""
    wide = jnp.promote_types(jnp.promote_types(jnp.asarray(a).dtype, jnp.asarray(b).dtype), jnp.float32)
    lead, inner, outer = site.atoms_of("l"), site.atoms_of("i"), site.atoms_of("o")
    product = contract(
        jnp.asarray(a, wide), (*lead, *inner, RANK), jnp.asarray(b, wide), (*lead, RANK, *outer), site.atoms,
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    return (site.scale * product).reshape(site.shape)


def _fold(params: Any, adapter: Adapter, change: Callable[..., Any], what: str = "merge") -> Any:
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"`{what}` needs an Adapter, which knows ranks and roles, got {type(adapter).__name__}; "
            "wrap a plain tree with `Adapter.from_leaves(leaves, plan.sites)`."
        )
    adapter = as_adapter(adapter, adapter.sites)
    paths, leaves, tree = tracing.flatten_params(params)
    check_params(adapter.sites, {p: x.shape for p, x in zip(paths, leaves, strict=True)})
    refuse_shared(paths, leaves, adapter)
    sites = {site.path: site for site in adapter.sites}
    new = {p: change(x, sites[p], adapter) if p in sites else x for p, x in zip(paths, leaves, strict=True)}
    new |= _biases(new, adapter, 1.0 if what == "merge" else -1.0)
    return jax.tree.unflatten(tree, [new[path] for path in paths])


def _biases(leaves: Mapping[tuple[str, ...], Any], adapter: Adapter, sign: float) -> dict[tuple[str, ...], Any]:
    """The base's biases with those on B added. **Raises** `ValueError` naming the sites that have no place for one."""
    out, homeless = {}, []
    for site in adapter.sites:
        if site.lora_bias:
            # A layer's bias has the axes of its weight that are kept, stacked ones first.
            kept = dict.fromkeys(atom.axis for role in "lo" for atom in site.atoms_of(role))
            path, shape = _bias_path(site), tuple(site.shape[axis] for axis in kept)
            home = leaves.get(path)
            if home is None or tuple(home.shape) != shape or site.path[-1] not in ("kernel", "weight"):
                homeless.append(f"`{site.name}` (a `{'.'.join(path)}` of shape {shape})")
                continue
            change = site.scale * jnp.asarray(adapter.vectors(site)[LORA_BIAS])
            wide = jnp.promote_types(jnp.promote_types(home.dtype, change.dtype), jnp.float32)
            out[path] = (jnp.asarray(home, wide) + sign * change.reshape(home.shape).astype(wide)).astype(home.dtype)
    if homeless:
        raise ValueError(
            f"the base has no bias for that of `lora_bias`: {', '.join(homeless[:4])}. Keep the adapter unmerged, or "
            "give these layers a bias of zeros."
        )
    return out


def _bias_path(site: Site) -> tuple[str, ...]:
    return (*site.path[:-1], "bias")


def _merged(leaf: Any, site: Site, adapter: Adapter) -> Any:
    if site.is_full:
        return jnp.asarray(adapter.leaf(site.path)).astype(leaf.dtype)
    if site.tokens:
        return with_rows(site, leaf, adapter.leaf(site.leaf_path(TOKENS)))
    a, b = adapter.factors(site)
    change = delta(site, a, b)
    wide = jnp.promote_types(leaf.dtype, change.dtype)
    dense = jnp.asarray(leaf, wide) + change.astype(wide)
    if site.dora:
        c = magnitude_scale(low_rank_norms(site, leaf, a, b), adapter.vectors(site)[MAGNITUDE])
        dense *= over_parameter(site, c).astype(wide)
    return dense.astype(leaf.dtype)


def _unmerged(leaf: Any, site: Site, adapter: Adapter, norm: Any) -> Any:
    change = delta(site, *adapter.factors(site))
    wide = jnp.promote_types(leaf.dtype, change.dtype)
    dense = jnp.asarray(leaf, wide)
    if site.dora:
        c = magnitude_scale(jnp.asarray(norm), adapter.vectors(site)[MAGNITUDE])
        if not isinstance(c, Tracer) and bool((c == 0).any()):
            raise ValueError(f"`{site.name}`: a magnitude of 0 has erased weights, which cannot be unmerged.")
        dense /= over_parameter(site, c).astype(wide)
    return (dense - change.astype(wide)).astype(leaf.dtype)


def _refuse_not_finite(merged: Any, adapter: Adapter) -> None:
    paths, leaves, _ = tracing.flatten_params(merged)
    changed = {site.path for site in adapter.sites} | {_bias_path(site) for site in adapter.sites if site.lora_bias}
    found = [(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if path in changed]
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


def refuse_shared(paths: list[tuple[str, ...]], leaves: list[Any], adapter: Adapter) -> None:
    """Raises if an adapted array also stands at another path, where it would not change along."""
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
