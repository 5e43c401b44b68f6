"""From an adapter for a changed base to a plain one, of twice the rank, for the original."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import reference
from lora_jax.adapters import Adapter, as_adapter, expected_leaves
from lora_jax.functional import check_params
from lora_jax.inits.matrices import as_matrices
from lora_jax.merging import delta
from lora_jax.sites import LORA_A, LORA_B, Site
from lora_jax.tracing import flatten_params


def to_original(adapter: Adapter, initial: Adapter, params: Any, new_params: Any) -> Adapter:
    """The trained `adapter` of PiSSA, OLoRA, CorDA or LoRA-GA as a plain one for the base as it was.

    W - s·A₀·B₀ + s·A·B is W + s·(A·B - A₀·B₀): factors of rank 2r, exact. The result is what PEFT calls a converted
    adapter; it is saved, loaded and merged like any other.

    **Arguments:**

    - `adapter`: after training; `initial`: as the initialiser returned it, before (keep it: training needs only
      `new_params`).
    - `params`, `new_params`: the original base and the one the initialiser returned. They are compared: their
      difference must be what `initial` took out, within the rounding of the base's dtype.

    **Raises:** `ValueError` naming parameters whose bases differ by anything else. A quantised base (LoftQ) does: write
    `new_params` beside such an adapter instead.

    **Source:** PEFT's `path_initial_model_for_weight_conversion`.
    """
    initial = as_adapter(initial, adapter.sites)
    if initial.sites != adapter.sites:
        raise ValueError("`initial` has other ranks or alphas than `adapter`: pass the adapter as it was initialised.")
    originals, changed = (_leaves(adapter, tree) for tree in (params, new_params))
    problems = [
        f"`{site.name}` (up to {worst:.2g} times the rounding of {site.dtype})"
        for site in adapter.sites
        if site.is_low_rank and (worst := _excess(site, initial, originals, changed)) > 1
    ]
    if problems:
        raise ValueError(
            "`params` and `new_params` differ by more than what `initial` took out: "
            + "; ".join(problems)
            + ". If the "
            "base was quantised (LoftQ) or trained, no adapter for the original is exact: export `new_params` with the "
            "adapter. Else pass the trees that went into the initialiser and came out of it."
        )
    return difference(adapter, initial)


def difference(adapter: Adapter, initial: Adapter) -> Adapter:
    """The adapter of rank r + r₀ for s·A·B - s₀·A₀·B₀; what else `adapter` trains is its own."""
    started = {site.path: site for site in initial.sites}
    leaves = {path: adapter.leaf(path) for path in expected_leaves(adapter.sites)}
    sites = []
    for site in adapter.sites:
        if site.is_low_rank:
            first = started[site.path]
            (a, b), (a0, b0) = adapter.factors(site), initial.factors(first)
            if site.scale == 0:  # turned off: any other scale will do for factors that are zero
                site, b = dataclasses.replace(site, alpha=float(site.rank), rslora=False), jnp.zeros_like(b)
            b0 = -(first.scale / site.scale) * b0
            leaves[site.leaf_path(LORA_A)] = jnp.concatenate([a, a0], axis=-1)
            leaves[site.leaf_path(LORA_B)] = jnp.concatenate([b, b0], axis=len(site.sizes_of("l")))
            rank = site.rank + first.rank
            grown = math.sqrt(rank / site.rank) if site.rslora else rank / site.rank
            site = dataclasses.replace(site, rank=rank, alpha=site.alpha * grown)
        sites.append(site)
    return Adapter.from_leaves(leaves, tuple(sites))


def _leaves(adapter: Adapter, params: Any) -> dict[tuple[str, ...], Any]:
    paths, leaves, _ = flatten_params(params)
    check_params(adapter.sites, {p: x.shape for p, x in zip(paths, leaves, strict=True)})
    return dict(zip(paths, leaves, strict=True))


def _excess(site: Site, initial: Adapter, originals: Any, changed: Any) -> float:
    """The worst of |W - new W - s·A₀·B₀| over its bound."""
    a, b = initial.factors(site)
    taken, magnitude = (as_matrices(site, delta(site, f(a), f(b))) for f in (jnp.asarray, jnp.abs))
    w, new = (as_matrices(site, tree[site.path]) for tree in (originals, changed))
    bound = reference.tolerance(site.dtype, site.rank) * (jnp.abs(w) + jnp.abs(magnitude))
    error = jnp.abs(w - new - taken)
    return float(jax.device_get(jnp.max(jnp.where(error == 0, 0, error / bound))))
