"""Several tensors of one shape made one: pruned, with conflicting signs left out, weighted and added.

`tensors` are (N, L, ...): N of them, each a stack of L weights that count as weights of their own. `weights` are (N,).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# What each method does first to each tensor, and whether signs are elected before the sum.
REDUCTIONS = {
    "linear": ("", False),
    "magnitude_prune": ("magnitude", False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}
MAJORITIES = ("total", "frequency")


def reduction(
    method: str, density: float | None, majority_sign: str
) -> Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]:
    """`reduce(tensors, weights, key) -> (L, ...)` of a method of `REDUCTIONS`.

    **Source:** Yadav et al., arXiv:2306.01708 (ties); Yu et al., arXiv:2311.03099 (dare).
    """
    pruning, elects = REDUCTIONS[method]

    def reduce(tensors: jax.Array, weights: jax.Array, key: jax.Array | None) -> jax.Array:
        if pruning == "magnitude":
            tensors = keep_largest(tensors, float(density or 1))
        elif pruning == "random":
            assert key is not None
            tensors = keep_random(tensors, float(density or 1), key)
        weighted = tensors * weights.reshape(-1, *(1,) * (tensors.ndim - 1)).astype(tensors.dtype)
        if not elects:
            return weighted.sum(0)
        agrees = agreeing(tensors, majority_sign)
        return (weighted * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)

    return reduce


def keep_largest(tensors: jax.Array, density: float) -> jax.Array:
    """Zeroes all but the `floor(density * size)` elements of largest magnitude of each weight."""
    if density >= 1:
        return tensors
    flat = tensors.reshape(*tensors.shape[:2], -1)
    count = int(density * flat.shape[-1])
    # Positions and not a threshold: of equal magnitudes no more than `count` may stay.
    chosen = jax.lax.top_k(abs(flat), count)[1]
    kept = jnp.put_along_axis(jnp.zeros(flat.shape, bool), chosen, True, -1, inplace=False)
    return jnp.where(kept, flat, 0).reshape(tensors.shape)


def keep_random(tensors: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Keeps each element with probability `density`, divided by it; each tensor has random bits of its own."""
    if density >= 1:
        return tensors
    return jnp.where(jax.random.bernoulli(key, density, tensors.shape), tensors / density, 0)


def agreeing(tensors: jax.Array, majority_sign: str) -> jax.Array:
    """Where a tensor's sign is the elected one: that of the sum, or of most tensors. Ties of the vote are positive."""
    signs = jnp.sign(tensors)
    votes = (tensors if majority_sign == "total" else signs).sum(0)
    return signs == jnp.where(votes >= 0, 1, -1).astype(signs.dtype)
