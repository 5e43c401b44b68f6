"""Dropout of the low-rank branch's input."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax import _compat


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Zeroes each element with probability `rate` and divides the rest by `1 - rate`; `key=None` is the identity.

    The mask is a function of `key` and `x.shape` alone, so a rematerialised forward pass and the backward
    pass see the same one and nothing of size `x` is stored.
    """
    if key is None or rate == 0:
        return x
    keep = _compat.laid_out_as(jax.random.bernoulli(key, 1 - rate, x.shape), x)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
