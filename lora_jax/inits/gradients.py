"""LoRA-GA: factors along the leading singular vectors of the loss's gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import tracing
from lora_jax.adapters import Adapter
from lora_jax.algebra import first, randomised_svd
from lora_jax.inits.assemble import Pair, adapter_of, check_ranks, factorised, low_rank, weights_of, without
from lora_jax.inits.batches import arguments
from lora_jax.inits.matrices import as_matrices
from lora_jax.planning import Plan
from lora_jax.sites import Site

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit", "paper")
# Power iterations, and random vectors beyond those that are kept, in ranks; as PEFT.
ITERATIONS, OVERSAMPLING = 4, 2


def lora_ga(
    plan: Plan,
    loss: Callable[..., jax.Array],
    params: Any,
    batches: Iterable[Any],
    *,
    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r",
    scale: Literal["stable", "weight_svd", "gd_scale", "unit", "paper"] = "stable",
    stable_gamma: float = 16,
    key: jax.Array | None = None,
) -> tuple[Adapter, Any]:
    """Starts where the first step of the adapter follows the first step of full fine-tuning.

    With G = U·S·Vh the mean gradient of a weight (out, in) over `batches`, A takes r rows of Vh and B, times its
    singular values, r other columns of U.

    **Arguments:**

    - `loss`: `loss(params, *batch)`, a scalar. A batch is a tuple of arguments, a dictionary of keyword arguments, or
      the one argument. Gradients are taken for the adapted parameters only.
    - `direction`: which triplets: `"ArB2r"` A the first r, B the next r; `"A2rBr"` the other way round; `"ArBr"`
      alternately; `"random"` the same r for both.
    - `scale`: `"stable"` B times out^(1/4) / sqrt(`stable_gamma`); `"weight_svd"` B of the weight's norm;
      `"gd_scale"` both over s; `"unit"` as they are. These four are PEFT's. `"paper"`: no singular values, both factors
      times out^(1/4) / sqrt(`stable_gamma`), as in the authors' own code.
    - `key`: of the random vectors of the decomposition and of `"random"`, by default `jax.random.key(0)`.

    **Returns:** `(adapter, new_params)`, as `pissa`: the new base is W - s·A·B.

    **Raises:** `ValueError` for no batch, an unknown word, or 2r beyond a side of the weight.

    **Source:** Wang et al., arXiv:2407.05000; details as PEFT 0.21, whose `"stable"` takes the number of inputs for out
    at GPT-2's `Conv1D`, and here takes that of outputs.
    """
    for name, value, known in (("direction", direction, DIRECTIONS), ("scale", scale, SCALES)):
        if value not in known:
            raise ValueError(f"`{name}={value!r}` is unknown; use one of {', '.join(map(repr, known))}.")
    check_ranks("lora_ga", plan, "the gradient, of which it takes twice the rank,", times=2)
    key = jax.random.key(0) if key is None else key
    weights = weights_of(plan, params)
    gradient = mean_gradient(plan, loss, params, batches)
    options = {"direction": direction, "scale": scale, "gamma": float(stable_gamma)}
    pairs = factorised(plan, gradient, key, _along_gradient, weights, **options)
    adapter = adapter_of(plan, params, pairs)
    return adapter, without(params, adapter)


def mean_gradient(
    plan: Plan, loss: Callable[..., jax.Array], params: Any, batches: Iterable[Any]
) -> dict[tuple[str, ...], jax.Array]:
    """The mean over `batches` of the gradient of `loss` by every adapted parameter, in float32 or wider."""
    sites = low_rank(plan)
    paths, leaves, tree = tracing.flatten_params(params)
    where = tuple(paths.index(site.path) for site in sites)
    total = [jnp.zeros_like(leaves[i], jnp.promote_types(leaves[i].dtype, jnp.float32)) for i in where]
    count = 0
    for batch in batches:
        total = _add(total, leaves, *arguments(batch), loss=loss, where=where, tree=tree)
        count += 1
    if not count:
        raise ValueError("`batches` is empty: LoRA-GA needs the gradient of at least one.")
    return {site.path: t / count for site, t in zip(sites, total, strict=True)}


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("loss", "where", "tree"))
def _add(
    total: list[Any],
    leaves: list[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    loss: Callable[..., jax.Array],
    where: tuple[int, ...],
    tree: Any,
) -> list[Any]:
    def value(chosen: list[Any]) -> jax.Array:
        filled = list(leaves)
        for i, leaf in zip(where, chosen, strict=True):
            filled[i] = leaf
        return loss(jax.tree.unflatten(tree, filled), *args, **kwargs)

    grads = jax.grad(value)([leaves[i] for i in where])
    return [t + g.astype(t.dtype) for t, g in zip(total, grads, strict=True)]


def _chosen(direction: str, rank: int, key: jax.Array) -> tuple[Any, Any]:
    """The indices of A's triplets and of B's."""
    if direction == "ArBr":
        return slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)
    if direction == "random":
        both = jax.random.permutation(key, 2 * rank)[:rank]
        return both, both
    first, second = slice(0, rank), slice(rank, 2 * rank)
    return (first, second) if direction == "ArB2r" else (second, first)


def _along_gradient(
    site: Site, g: jax.Array, key: jax.Array, weight: jax.Array, *, direction: str, scale: str, gamma: float
) -> Pair:
    own_key, shuffle = jax.random.split(key)
    # The gradient of Wᵀ is U·S·Vh: here the left vectors are those of the input.
    found = randomised_svd(g, 2 * site.rank, own_key, ITERATIONS, OVERSAMPLING * site.rank)
    v, s, uh = first(2 * site.rank, *found)
    for_a, for_b = _chosen(direction, site.rank, shuffle)
    values = s[..., for_b]
    a, b = v[..., for_a], uh[..., for_b, :]
    by = site.fan_out**0.25 / gamma**0.5
    if scale == "paper":
        return a * by, b * by
    b = values[..., None] * b
    if scale == "gd_scale":
        return a / site.scale, b / site.scale
    if scale == "weight_svd":
        norm = jnp.linalg.norm(as_matrices(site, weight), 2, (-2, -1))[..., None, None]
        largest = values[..., :1, None]
        return a, b * (norm / jnp.where(largest == 0, norm, largest))
    return a, b * by if scale == "stable" else b
