"""Initial values from the base's weights alone: PiSSA and OLoRA. Both move a part of each weight into its factors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import Adapter
from lora_jax.algebra import first, randomised_svd
from lora_jax.inits.assemble import Pair, adapter_of, balanced, check_ranks, factorised, weights_of, without
from lora_jax.planning import Plan
from lora_jax.sites import Site

# Random vectors beyond the rank, as Halko et al. advise in section 4.2.
OVERSAMPLING = 8


def pissa(
    plan: Plan, params: Any, *, iterations: int | None = None, key: jax.Array | None = None
) -> tuple[Adapter, Any]:
    """Principal singular values and vectors: s·A·B is the best rank-r part of each weight, the base keeps the rest.

    **Arguments:**

    - `plan`, `params`: the plan and the base, on which nothing is changed. Every kind of site will do; of a stack,
      each layer is decomposed by itself, and a convolution's kernel is a matrix of (window and inputs, outputs).
    - `iterations`: None for the exact decomposition; a whole number for a randomised one with so many power
      iterations (PEFT's `"pissa_niter_4"`), many times faster on large weights. W - s·A·B + s·A·B is W either way.
    - `key`: of the random vectors, by default `jax.random.key(0)`. Each site's depend on `key` and its name only.

    **Returns:** `(adapter, new_params)`. Train and run the adapter with `new_params`: with `params` it would count the
    principal part twice. `to_original` makes a plain adapter for `params` of it. In half precision the new base is
    rounded once, so the start equals the base up to that rounding.

    **Raises:** `ValueError` if the rank is larger than a side of the weight.

    **Source:** Meng et al., arXiv:2404.02948.
    """
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0):
        raise ValueError(f"`iterations={iterations!r}` must be None (exact) or a whole number, e.g. 4.")
    check_ranks("pissa", plan)
    key = jax.random.key(0) if key is None else key
    pairs = factorised(plan, weights_of(plan, params), key, _principal, iterations=iterations)
    adapter = adapter_of(plan, params, pairs)
    return adapter, without(params, adapter)


def olora(plan: Plan, params: Any) -> tuple[Adapter, Any]:
    """An orthonormal B and the matching A: the first r columns of Q and rows of R, where Wᵀ = Q·R for each weight.

    Wᵀ is the weight as PyTorch stores it, (out, in). Deterministic.

    **Returns, raises:** as `pissa`. **Source:** Büyükakyüz, arXiv:2406.01775; without 1/s on the factors, as PEFT, so
    that the base loses s·A·B.
    """
    check_ranks("olora", plan)
    adapter = adapter_of(plan, params, factorised(plan, weights_of(plan, params), jax.random.key(0), _orthonormal))
    return adapter, without(params, adapter)


def _principal(site: Site, m: jax.Array, key: jax.Array, _: None, *, iterations: int | None) -> Pair:
    if iterations is None:
        found = jnp.linalg.svd(m, full_matrices=False)
    else:
        found = randomised_svd(m, site.rank, key, iterations, OVERSAMPLING)
    return balanced(site, *first(site.rank, *found))


def _orthonormal(site: Site, m: jax.Array, key: jax.Array, _: None) -> Pair:
    q, r = jnp.linalg.qr(jnp.swapaxes(m, -1, -2))
    return jnp.swapaxes(r[..., : site.rank, :], -1, -2), jnp.swapaxes(q[..., : site.rank], -1, -2)
