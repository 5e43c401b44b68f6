"""CorDA: a decomposition of each weight as seen through the covariance of its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters import Adapter
from lora_jax.inits.assemble import Pair, adapter_of, balanced, check_ranks, factorised, low_rank, weights_of, without
from lora_jax.inits.collect import ROWS, collect, last
from lora_jax.planning import Plan
from lora_jax.sites import Site

# PEFT's and the authors' own: how much of its mean diagonal the covariance gets added, doubled while the inverse is
# worse than this.
DAMPING, INVERSE_ERROR, DOUBLINGS = 0.01, 0.05, 40


@dataclasses.dataclass(frozen=True)
class SecondMoment:
    """The sum of x·xᵀ over all inputs."""

    def start(self, site: Site) -> dict[str, jax.Array]:
        return {"sum": jnp.zeros((site.fan_in, site.fan_in), _wide(site)), ROWS: jnp.zeros((), jnp.float32)}

    def update(self, state: dict[str, jax.Array], rows: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
        with jax.default_matmul_precision("highest"):
            moment = (rows * weights[:, None]).T @ rows
        return {"sum": state["sum"] + moment.astype(state["sum"].dtype), ROWS: state[ROWS] + weights.sum()}


def corda(
    plan: Plan,
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    method: Literal["ipm", "kpm"] = "ipm",
    mask: Callable[..., jax.Array] | None = None,
) -> tuple[Adapter, Any]:
    """With C = sum of x·xᵀ over the inputs of a weight and Wᵀ·C = U·S·Vh, s·A·B is the part U_r·S_r·Vh_r·C⁻¹ of Wᵀ.

    **Arguments:**

    - `fn`: as for the plan; it runs once for each batch, and what every adapted weight is multiplied by is collected
      on the way.
    - `batches`: any iterable; a batch is a tuple of arguments of `fn`, a dictionary of keyword arguments, or the one
      argument. 256 samples of 2048 tokens served the authors.
    - `method`: `"ipm"` takes the r largest directions (learn what the data are about), `"kpm"` the r smallest (keep
      what the data ask for).
    - `mask`: `mask(*batch)`, weights of the inputs' rows: zero for padding. Its dimensions are the first ones
      of the inputs.

    **Returns:** `(adapter, new_params)`, as `pissa`: the new base is W - s·A·B. Deterministic.

    **Raises:** `ValueError` for no batch, weights whose inputs were not seen, or a rank above a side of the weight.

    **Source:** Yang et al., arXiv:2406.05223. C is scaled to a mean diagonal of one, which changes neither s·A·B nor
    the base and leaves A and B of one size; PEFT divides each sample by its largest entry instead.
    """
    if method not in ("ipm", "kpm"):
        raise ValueError(f"`method={method!r}` is unknown; use 'ipm' or 'kpm'.")
    check_ranks("corda", plan)
    state = last(collect(plan, fn, params, batches, SecondMoment(), mask))
    moments = {site.path: state[site.name]["sum"] for site in low_rank(plan)}
    pairs = factorised(plan, weights_of(plan, params), jax.random.key(0), _oriented, moments, method=method)
    adapter = adapter_of(plan, params, pairs)
    return adapter, without(params, adapter)


def _oriented(site: Site, m: jax.Array, key: jax.Array, moment: jax.Array, *, method: str) -> Pair:
    """From matrices (layers, in, out) with mᵀ·C = U·S·Vh."""
    moment = moment.astype(m.dtype)
    c, inverse = _damped(moment / jnp.mean(jnp.diagonal(moment, axis1=-2, axis2=-1), -1)[..., None, None])
    v, s, uh = jnp.linalg.svd(c @ m, full_matrices=False)
    kept = slice(0, site.rank) if method == "ipm" else slice(s.shape[-1] - site.rank, None)
    return balanced(site, inverse @ v[..., kept], s[..., kept], uh[..., kept, :])


def _damped(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each matrix (of mean diagonal one) with enough added to its diagonal to be inverted well, and its inverse."""
    eye = jnp.eye(c.shape[-1], dtype=c.dtype)

    def inverted(damping: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        full = c + damping[..., None, None] * eye
        inverse = jnp.linalg.inv(full)
        return full, inverse, jnp.linalg.norm(full @ inverse - eye, axis=(-2, -1))

    def bad(state: Any) -> jax.Array:
        n, _, (_, _, error) = state
        return (n < DOUBLINGS) & ~(error < INVERSE_ERROR).all()

    def double(state: Any) -> Any:
        n, damping, (_, _, error) = state
        damping = jnp.where(error < INVERSE_ERROR, damping, 2 * damping)
        return n + 1, damping, inverted(damping)

    first = jnp.full(c.shape[:-2], DAMPING, c.dtype)
    _, _, (full, inverse, _) = lax.while_loop(bad, double, (0, first, inverted(first)))
    return full, inverse


def _wide(site: Site) -> Any:
    return jnp.promote_types(site.dtype, jnp.float32)
