"""`extract`: an adapter out of two full sets of parameters, a base and the same model fine-tuned in full."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tracing
from lora_jax.adapters import Adapter
from lora_jax.algebra import as_factors, first, randomised_svd
from lora_jax.functional import check_params
from lora_jax.planning import Plan
from lora_jax.sites import LORA_A, LORA_B, Site


@dataclass(frozen=True)
class Extraction:
    """`print` it. `adapter`, and `kept`: for each parameter the share of its squared change that the rank holds."""

    adapter: Adapter
    kept: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.kept), default=0)
        lines = [f"{name:<{width}}  {share:8.2%}" for name, share in sorted(self.kept.items(), key=lambda kv: kv[1])]
        return "\n".join([f"{'parameter':<{width}}  of the change", *lines])


def extract(
    plan: Plan,
    base: Any,
    tuned: Any,
    *,
    key: jax.Array,
    iterations: int = 4,
    oversample: int = 8,
    partial: bool = False,
) -> Extraction:
    """The adapter of the plan's ranks that turns `base` into `tuned` as nearly as it can.

    One tensor after the other: beside the two trees, which may be memory maps, only one change and its SVD are in
    memory (of a stack of layers, one layer's). Scales are the plan's; `modules_to_save` are copied.

    **Arguments:**

    - `base`, `tuned`: parameters of the plan's model. The difference is taken in float32, or float64 for such bases.
    - `iterations`, `oversample`: of the randomised SVD (`lora_jax.algebra.randomised_svd`), which `key` starts.
    - `partial`: accept that parameters which the plan does not adapt (biases, norms) differ too and are lost.

    **Raises:** `ValueError` if the trees are not the plan's, hold a number that is not finite, or differ in parameters
    that the plan leaves out, naming them; and for a plan that trains more or less than two factors (DoRA, `lora_bias`,
    `use_qalora`, token rows), which no SVD of a difference gives.
    """
    _refuse_more_than_factors(plan)
    paths, old, _ = tracing.flatten_params(base)
    new_paths, new, _ = tracing.flatten_params(tuned)
    check_params(plan.sites, {path: tuple(np.shape(x)) for path, x in zip(paths, old, strict=True)})
    both = _paired(paths, old, new_paths, new)
    sites = {site.path: site for site in plan.sites}
    if lost := [] if partial else [path for path in both if path not in sites and _differ(*both[path])]:
        names = ", ".join(f"`{'.'.join(path)}`" for path in lost[:6])
        more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
        raise ValueError(
            f"{names}{more} differ between the two models, and the plan does not adapt them: name them in "
            "`target_modules` or `modules_to_save`, or lose their changes with `partial=True`."
        )
    leaves: dict[tuple[str, ...], Any] = {}
    kept: dict[str, float] = {}
    for site in plan.sites:
        before, after = both[site.path]
        if site.is_full:
            leaves[site.path] = jnp.array(after, jnp.promote_types(after.dtype, plan.config.dtype))
            continue
        factors, share = _one(site, before, after, jax.random.fold_in(key, site.seed), iterations, oversample)
        leaves[site.leaf_path(LORA_A)], leaves[site.leaf_path(LORA_B)] = (x.astype(plan.config.dtype) for x in factors)
        kept[site.name] = share
    return Extraction(Adapter.from_leaves(leaves, plan.sites), kept)


def _refuse_more_than_factors(plan: Plan) -> None:
    special = {
        "use_dora": [site for site in plan.sites if site.dora],
        "lora_bias": [site for site in plan.sites if site.lora_bias],
        "use_qalora": [site for site in plan.sites if site.group > 1],
        "trainable_token_indices": [site for site in plan.sites if site.tokens],
    }
    for field, sites in special.items():
        if names := [f"`{site.name}`" for site in sites]:
            raise ValueError(
                f"`extract` finds two factors for each parameter, and `{field}` plans something else for "
                f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}: plan without `{field}`."
            )


def _paired(paths: Any, old: Any, new_paths: Any, new: Any) -> dict[tuple[str, ...], tuple[Any, Any]]:
    before, after = dict(zip(paths, old, strict=True)), dict(zip(new_paths, new, strict=True))
    problems = [f"`{'.'.join(p)}` is in one of the two only" for p in before.keys() ^ after.keys()]
    problems += [
        f"`{'.'.join(p)}` is {np.shape(before[p])} in the base and {np.shape(after[p])} in the tuned model"
        for p in before
        if p in after and np.shape(before[p]) != np.shape(after[p])
    ]
    if problems:
        raise ValueError("these are not two states of one model: " + "; ".join(sorted(problems)[:6]) + ".")
    return {path: (before[path], after[path]) for path in paths}


def _differ(one: Any, other: Any) -> bool:
    return one is not other and not np.array_equal(np.asarray(one), np.asarray(other))


def _one(site: Site, before: Any, after: Any, key: jax.Array, iterations: int, oversample: int) -> Any:
    """Both factors of a site, and the share of the change that they hold."""
    order = [atom for role in "lio" for atom in site.atoms_of(role)]
    sizes = tuple(atom.size for atom in site.atoms)

    def stacked(x: Any) -> Any:
        x = np.asarray(x).reshape(sizes).transpose([site.atoms.index(atom) for atom in order])
        return x.reshape(-1, site.fan_in, site.fan_out)

    parts = []
    for i, (w, v) in enumerate(zip(stacked(before), stacked(after), strict=True)):
        parts.append(_decomposed(w, v, jax.random.fold_in(key, i), site.rank, iterations, oversample))
    u, s, vt, size = (jnp.stack(part) for part in zip(*parts, strict=True))
    if not bool(jnp.isfinite(size).all()):
        raise ValueError(f"`{site.name}`: the two models differ by numbers that are not finite; one of them is broken.")
    root = jnp.sqrt(s / abs(site.scale))
    factors = as_factors(site, u * root[..., None, :], jnp.sign(site.scale) * root[..., None] * vt, u.dtype)
    whole = float(size.sum())
    return factors, float((s**2).sum()) / whole if whole else 1.0


@functools.partial(jax.jit, static_argnames=("rank", "iterations", "oversample"))
def _decomposed(before: Any, after: Any, key: jax.Array, rank: int, iterations: int, oversample: int) -> Any:
    wide = jnp.promote_types(before.dtype, jnp.float32)
    change = after.astype(wide) - before.astype(wide)
    return *first(rank, *randomised_svd(change, rank, key, iterations, oversample)), jnp.sum(change**2)
