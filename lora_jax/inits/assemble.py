"""What every initialiser of this package does around its own algebra: weights in, adapter and new base out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lora_jax import tracing
from lora_jax.adapters import Adapter, expected_leaves
from lora_jax.algebra import as_factors
from lora_jax.functional import check_params
from lora_jax.initialisers import init_bias
from lora_jax.inits.matrices import as_matrices
from lora_jax.interpret import site_key
from lora_jax.merging import unmerge
from lora_jax.planning import Plan
from lora_jax.sites import LORA_A, LORA_B, LORA_BIAS, MAGNITUDE, Site
from lora_jax.weights.norms import norms

Path = tuple[str, ...]
Pair = tuple[jax.Array, jax.Array]


def low_rank(plan: Plan) -> tuple[Site, ...]:
    """The plan's sites that have factors. **Raises** `ValueError` for none, or if A has rows for groups of inputs."""
    sites = tuple(site for site in plan.sites if site.is_low_rank)
    if not sites:
        raise ValueError("the plan adapts nothing by factors: there is nothing to initialise.")
    if grouped := [f"`{site.name}`" for site in sites if site.group > 1]:
        raise ValueError(
            f"{', '.join(grouped[:3])}: with `use_qalora` A has one row for several inputs, which no decomposition of "
            "a weight fits; use `plan.init`."
        )
    return sites


def weights_of(plan: Plan, params: Any) -> dict[Path, Any]:
    """The leaves of `params` by path. **Raises** `ValueError` if they are not those of the plan."""
    paths, leaves, _ = tracing.flatten_params(params)
    check_params(plan.sites, {p: x.shape for p, x in zip(paths, leaves, strict=True)})
    return dict(zip(paths, leaves, strict=True))


def factorised(
    plan: Plan,
    arrays: Mapping[Path, Any],
    key: jax.Array,
    factorise: Callable[..., Pair],
    more: Mapping[Path, Any] | None = None,
    **options: Any,
) -> dict[Path, Pair]:
    """For each site, `factorise(site, matrices, the site's key, more, **options)` as the site's own factors.

    **Arguments:** `arrays`, of the parameters' shapes, by path; `more`, any arrays besides; `options`, hashable. The
    function is traced once for each kind of site, which has no name then.
    """
    out = {}
    for site in low_rank(plan):
        extra = None if more is None else more[site.path]
        nameless = dataclasses.replace(site, path=("",))
        out[site.path] = _factorised(
            jnp.asarray(arrays[site.path]), site_key(key, site), extra,
            factorise=factorise, site=nameless, dtype=str(plan.config.dtype), options=tuple(options.items()),
        )  # fmt: skip
    return out


@functools.partial(jax.jit, static_argnames=("factorise", "site", "dtype", "options"))
def _factorised(
    array: jax.Array, key: jax.Array, more: Any, *, factorise: Any, site: Site, dtype: str, options: Any
) -> Pair:
    with jax.default_matmul_precision("highest"):
        a, b = factorise(site, as_matrices(site, array), key, more, **dict(options))
    return as_factors(site, a, b, dtype)


def adapter_of(
    plan: Plan,
    params: Any,
    pairs: Mapping[Path, Pair],
    sites: Mapping[Path, Site] | None = None,
    bases: Mapping[Path, Any] | None = None,
) -> Adapter:
    """A new adapter of the plan with these factors; what else it trains starts as `plan.init` has it.

    **Arguments:**

    - `sites`: replace the plan's, where a rank or an alpha changed.
    - `bases`: the weights that the factors are added to, for DoRA's magnitudes, which are the norms of the sum. Without
      them that sum is the weight in `params`.
    """
    rest = tuple(site for site in plan.sites if not site.is_low_rank)
    others = dataclasses.replace(plan, sites=rest).init(jax.random.key(0), params)
    leaves = {path: others.leaf(path) for path in expected_leaves(rest)}
    weights = weights_of(plan, params)
    out = tuple((sites or {}).get(site.path, site) for site in plan.sites)
    for site in out:
        if not site.is_low_rank:
            continue
        a, b = leaves[site.leaf_path(LORA_A)], leaves[site.leaf_path(LORA_B)] = pairs[site.path]
        if site.dora:
            w, a = (weights[site.path], jnp.zeros_like(a)) if bases is None else (bases[site.path], a)
            leaves[site.leaf_path(MAGNITUDE)] = norms(site, w, a, b).astype(b.dtype)
        if site.lora_bias:
            leaves[site.leaf_path(LORA_BIAS)] = init_bias(site, jax.random.key(0), "kaiming", str(b.dtype))
    _refuse_not_finite(out, pairs)
    return Adapter.from_leaves(leaves, out)


def without(params: Any, adapter: Adapter) -> Any:
    """`params` with W - s·A·B for every adapted W, so that the adapted model starts as the base was."""
    # Its factors alone: the magnitudes of DoRA and the biases start without effect.
    sites = tuple(dataclasses.replace(site, dora=False, lora_bias=False) for site in adapter.sites if site.is_low_rank)
    leaves = {path: adapter.leaf(path) for path in expected_leaves(sites)}
    return unmerge(params, Adapter.from_leaves(leaves, sites))


def check_ranks(method: str, plan: Plan, of: str = "the weight", times: int = 1) -> None:
    """Raises unless `times` the rank of every site is at most the number of directions that its weight has."""
    for site in low_rank(plan):
        most = min(site.fan_in, site.fan_out) // times
        if site.rank > most:
            raise ValueError(
                f"`{method}` needs rank <= {most} for `{site.name}`: {of} has {min(site.fan_in, site.fan_out)} "
                f"directions, and the rank is {site.rank}. Lower it with `rank_pattern={{{site.name!r}: {most}}}`, or "
                "leave the parameter out."
            )


def balanced(site: Site, u: jax.Array, s: jax.Array, vh: jax.Array) -> Pair:
    """A and B of equal size with scale · A·B = U·S·Vh. A negative scale's sign goes to B."""
    root = jnp.sqrt(s / abs(site.scale))
    return u * root[..., None, :], jnp.sign(site.scale) * root[..., :, None] * vh


def _refuse_not_finite(sites: tuple[Site, ...], pairs: Mapping[Path, Pair]) -> None:
    if any(isinstance(x, Tracer) for pair in pairs.values() for x in pair):
        return  # under `jit` there is no value to look at
    finite = dict(zip(pairs, _finite(list(pairs.values())), strict=True))
    if bad := [f"`{site.name}` {site.shape}" for site in sites if not finite.get(site.path, True)]:
        raise ValueError(
            f"the initial factors of {', '.join(bad)} are not finite: the weight or the data hold NaN or infinite "
            "numbers, or the factors' dtype is too narrow."
        )


@jax.jit
def _finite(pairs: list[Pair]) -> list[jax.Array]:
    return [jnp.isfinite(a).all() & jnp.isfinite(b).all() for a, b in pairs]
