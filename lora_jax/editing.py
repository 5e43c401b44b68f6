"""Small changes to an adapter, each a new adapter: other ranks, other scales, other names, fewer parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax import targets
from lora_jax.adapters import Adapter, expected_leaves
from lora_jax.algebra import as_factors, as_matrices, first, product_svd
from lora_jax.initialisers import init_factors
from lora_jax.sites import LORA_A, LORA_B, LORA_BIAS, Site


def resized(site: Site, rank: int, scale: float) -> Site:
    """The site with another rank, and the alpha that gives `scale` with it."""
    return replace(site, rank=rank, alpha=scale * rank, rslora=False)


def resize(adapter: Adapter, rank: int | Mapping[str, int], *, key: jax.Array | None = None) -> Adapter:
    """The adapter at another rank: the same change of the weights where the rank grows, the nearest where it falls.

    Scales stay what they were (alpha follows the rank). A smaller rank is the truncated SVD of the product, from its
    factors, with the singular values shared out evenly between the two. A bias on B (`lora_bias`) stays as it is.

    **Arguments:**

    - `rank`: for every parameter, or `{pattern: rank}`, where a pattern matches the end of a name as in
      `LoRAConfig.rank_pattern`; others keep theirs.
    - `key`: with a key, new columns of A are random (as `init="kaiming"`) and new rows of B zero, so that they
      train. Without one both are zero, which is right for serving and can never train: neither factor has a gradient.

    **Raises:** `ValueError` for a rank that is no positive whole number, a pattern that matches nothing, or DoRA,
    whose magnitude a truncation would no longer fit.
    """
    patterns = dict(rank) if isinstance(rank, Mapping) else {".*": rank}
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"the rank {value!r} for {pattern!r} must be a positive whole number.")
    check_only_factors([s for s in adapter.sites if not s.is_full], "`resize` cannot change", but=(LORA_BIAS,))
    sites, leaves, used = [], {}, set()
    for site in adapter.sites:
        keys = [] if site.is_full else targets.pattern_keys(site.path, patterns)
        used.update(keys)
        leaves.update({path: adapter.leaf(path) for path in expected_leaves((site,))})
        if not keys:
            sites.append(site)
            continue
        new = int(patterns[keys[0]])
        alpha = site.alpha * (math.sqrt(new / site.rank) if site.rslora else new / site.rank)
        grown = replace(site, rank=new, alpha=alpha)
        sites.append(grown)
        # As they are stored: what A has one row for stays one group.
        a, b = (adapter.leaf(site.leaf_path(factor)) for factor in (LORA_A, LORA_B))
        leaves[site.leaf_path(LORA_A)], leaves[site.leaf_path(LORA_B)] = (
            _grown(site, grown, a, b, key) if new >= site.rank else _shrunk(site, grown, a, b)
        )
    if unused := [pattern for pattern in patterns if pattern not in used]:
        raise ValueError(f"{', '.join(map(repr, unused))} match no adapted parameter of low rank.")
    return Adapter.from_leaves(leaves, tuple(sites))


def _grown(site: Site, grown: Site, a: jax.Array, b: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    rows = len(site.sizes_of("l"))
    more = grown.rank - site.rank
    b = jnp.pad(b, [(0, more if d == rows else 0) for d in range(b.ndim)])
    if key is None or more == 0:
        return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)]), b
    new, _ = init_factors(replace(site, rank=more), key, "kaiming", str(a.dtype))
    return jnp.concatenate([a, new], -1), b


def _shrunk(site: Site, shrunk: Site, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    u, s, vt = first(shrunk.rank, *product_svd(*as_matrices(site, a, b)))
    root = jnp.sqrt(s)
    a_new, _ = as_factors(shrunk, u * root[..., None, :], root[..., None] * vt, a.dtype)
    _, b_new = as_factors(shrunk, u * root[..., None, :], root[..., None] * vt, b.dtype)
    return a_new, b_new


def rescale(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with `factor` times its change of the weights: alpha is multiplied, the factors are the same arrays.

    A bias on B (`lora_bias`) counts `factor` times as well, since alpha scales it too. A factor of 0 gives the base,
    bit for bit, and the adapter's gradient is zero.

    **Raises:** `ValueError` for a factor that is not finite, and for `modules_to_save` and DoRA, whose change is
    not linear in alpha. `TypeError` for a factor that is no number: a traced one multiplies an `AdapterBank`'s scales.
    """
    return Adapter(adapter.to_dict(), rescaled(adapter.sites, factor))


def rescaled(sites: Sequence[Site], factor: float) -> tuple[Site, ...]:
    """Sites of `factor` times the scale. **Raises:** as `rescale`."""
    check_number("factor", factor)
    factor = float(factor)
    if not math.isfinite(factor):
        raise ValueError(f"`factor={factor!r}` must be a finite number.")
    check_only_factors(sites, "`rescale` cannot change", but=(LORA_BIAS,))
    return tuple(replace(site, alpha=site.alpha * factor) for site in sites)


def select(adapter: Adapter, target_modules: str | Sequence[str]) -> Adapter:
    """The part of an adapter whose parameters match, by the rules of `LoRAConfig.target_modules`.

    **Raises:** `ValueError` for an entry that matches nothing.
    """
    return _part(adapter, target_modules, keep=True)


def without(adapter: Adapter, target_modules: str | Sequence[str]) -> Adapter:
    """The adapter without the parameters that match, as `select` has those that do."""
    return _part(adapter, target_modules, keep=False)


def _part(adapter: Adapter, target_modules: str | Sequence[str], keep: bool) -> Adapter:
    patterns = targets.Patterns(target_modules)
    found = {site.path: [entry for entry, _ in patterns.matches(site.path)] for site in adapter.sites}
    used = {entry for entries in found.values() for entry in entries}
    if unused := [entry for entry in patterns.entries if entry not in used]:
        paths = [site.path for site in adapter.sites]
        raise ValueError(
            "; ".join(f"{entry!r} matches nothing, closest: {targets.nearest(entry, paths)}" for entry in unused)
        )
    return _with_sites(adapter, {s: s for s in adapter.sites if bool(found[s.path]) == keep})


def rename(adapter: Adapter, name: Callable[[tuple[str, ...]], tuple[str, ...]] | Mapping[str, str]) -> Adapter:
    """The adapter for the same parameters under other paths.

    **Arguments:** `name`: from an old path to a new one, or `{dotted prefix: new prefix}` (`{"model.layers":
    "layers"}`, `{"model": ""}`, `{"": "model"}`), where the longest that fits counts.

    **Raises:** `ValueError` for a prefix that begins no path, or if two parameters would have one name.
    """
    new_path = name if callable(name) else _by_prefix(name, [site.path for site in adapter.sites])
    renamed = {site: replace(site, path=tuple(new_path(site.path))) for site in adapter.sites}
    if len({site.path for site in renamed.values()}) < len(renamed):
        raise ValueError("two parameters would have one name: " + ", ".join(sorted(s.name for s in renamed.values())))
    return _with_sites(adapter, renamed)


def _by_prefix(prefixes: Mapping[str, str], paths: Sequence[tuple[str, ...]]) -> Callable[[tuple[str, ...]], Any]:
    parts = {_path(old): _path(new) for old, new in prefixes.items()}
    if unused := [".".join(old) for old in parts if not any(p[: len(old)] == old for p in paths)]:
        first_name = ".".join(paths[0]) if paths else "nothing"
        raise ValueError(f"no adapted parameter begins with {', '.join(unused)}; the first one is {first_name}.")

    def name(path: tuple[str, ...]) -> tuple[str, ...]:
        fitting = [old for old in parts if path[: len(old)] == old]
        old = max(fitting, key=len, default=None)
        return path if old is None else (*parts[old], *path[len(old) :])

    return name


def _path(dotted: str) -> tuple[str, ...]:
    return tuple(filter(None, dotted.split(".")))


def _with_sites(adapter: Adapter, sites: Mapping[Site, Site]) -> Adapter:
    """The leaves of the old sites at the places of the new ones."""
    leaves = {}
    for old, new in sites.items():
        places = zip(expected_leaves((old,)), expected_leaves((new,)), strict=True)
        leaves.update({to: adapter.leaf(place) for place, to in places})
    return Adapter.from_leaves(leaves, tuple(sites.values()))


def ungrouped(adapter: Adapter) -> Adapter:
    """The same change by ordinary factors: QALoRA's A with the row of a group repeated for each of its inputs."""
    if all(site.group == 1 for site in adapter.sites):
        return adapter
    leaves = {path: adapter.leaf(path) for path in expected_leaves(adapter.sites)}
    for site in adapter.sites:
        if site.group > 1:
            leaves[site.leaf_path(LORA_A)] = adapter.factors(site)[0]
    return Adapter.from_leaves(leaves, tuple(replace(site, group=1) for site in adapter.sites))


def check_number(name: str, value: Any) -> None:
    """Raises a `TypeError` for what is no number of the host's: alphas are a part of an adapter's structure."""
    is_array = isinstance(value, np.ndarray | jax.Array) and value.ndim == 0 and not isinstance(value, Tracer)
    if not is_array and (isinstance(value, bool) or not isinstance(value, int | float | np.number)):
        what = "traced" if isinstance(value, Tracer) else f"a {type(value).__name__}"
        raise TypeError(
            f"`{name}` is {what}: write a number. Scales that change inside of `jit` are those of an `AdapterBank`'s "
            "stack."
        )


def check_only_factors(sites: Sequence[Site], what: str, but: Sequence[str] = ()) -> None:
    """Raises for sites that are more than `scale * A @ B`: full copies, and kinds with leaves of their own (DoRA).

    `but`: names of leaves that may be there.
    """
    problems = []
    for site in sites:
        known = {site.leaf_path(name) for name in (LORA_A, LORA_B, *but)}
        more = ["/".join(path) for path in expected_leaves((site,)) if path not in known]
        if site.is_full:
            problems.append(f"`{site.name}` is trained in full (`modules_to_save`)")
        elif more:
            problems.append(f"`{site.name}` has {', '.join(more)} beside its two factors")
    if problems:
        more_text = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{what}: {'; '.join(problems[:3])}{more_text}. That is no low-rank change; take it out first "
            "(`lora_jax.without`), or merge the adapter."
        )
