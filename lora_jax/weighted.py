"""One parameter of several adapters made one: the arithmetic behind `combine`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.algebra import as_factors, as_matrices, first, product_svd, times
from lora_jax.reductions import REDUCTIONS, reduction
from lora_jax.sites import Site

SVD = "_svd"


class How(NamedTuple):
    """The settings of `combine` that decide what is computed."""

    method: str
    density: float | None
    majority_sign: str
    clamp: float | None


@functools.partial(jax.jit, static_argnames=("sites", "target", "how"))
def combined(
    factors: Sequence[tuple[Any, Any]], weights: Sequence[Any], key: jax.Array | None, *,
    sites: tuple[Site, ...], target: Site, how: How,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`(lora_A, lora_B)` of `target`, of scale one, from the factors of `sites`, in the wider of their dtypes."""
    dtype = jnp.result_type(*(x for pair in factors for x in pair))
    pairs = [as_matrices(site, *pair) for site, pair in zip(sites, factors, strict=True)]
    left, right = _matrices(pairs, weights, [site.scale for site in sites], key, target.rank, how)
    return as_factors(target, left, right, dtype)


def _matrices(
    pairs: list[Any], weights: Sequence[Any], scales: list[float], key: jax.Array | None, rank: int, how: How
) -> tuple[jax.Array, jax.Array]:
    wide = jnp.result_type(*(x for pair in pairs for x in pair))
    method = how.method.removesuffix(SVD)
    w = jnp.stack([jnp.asarray(weight, wide) for weight in weights])
    c = w * jnp.asarray(scales, wide)
    if method not in REDUCTIONS:
        left = jnp.concatenate([x * c[i] for i, (x, _) in enumerate(pairs)], -1)
        right = jnp.concatenate([y for _, y in pairs], -2)
        return (left, right) if method == "cat" else _decomposed(product_svd(left, right), rank, how.clamp)
    reduce = reduction(method, how.density, how.majority_sign)
    keys = [None, None] if key is None else list(jax.random.split(key))
    if how.method.endswith(SVD):
        changes = jnp.stack([times(*pair) * scale for pair, scale in zip(pairs, scales, strict=True)])
        u, s, vt = jnp.linalg.svd(reduce(changes, w, keys[0]), full_matrices=False)
        return _decomposed((u, s, vt), rank, how.clamp)
    # The sign on one side: on both it would cancel.
    root = jnp.sqrt(abs(c))
    of_left, of_right = (jnp.stack([pair[side] for pair in pairs]) for side in (0, 1))
    return reduce(of_left, jnp.sign(c) * root, keys[0]), reduce(of_right, root, keys[1])


def _decomposed(svd: tuple[Any, Any, Any], rank: int, clamp: float | None) -> tuple[jax.Array, jax.Array]:
    u, s, vt = first(rank, *svd)
    left, right = u, s[..., None] * vt
    if clamp is not None:
        stacked = left.shape[0]
        every = jnp.concatenate([left.reshape(stacked, -1), right.reshape(stacked, -1)], -1)
        bound = jnp.quantile(every, clamp, axis=-1)[:, None, None]
        left, right = jnp.clip(left, -bound, bound), jnp.clip(right, -bound, bound)
    return left, right
