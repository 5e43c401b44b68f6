"""Initial values of the factors. Unless both are random, A·B = 0 and the adapted model starts as the base."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sites import Site


def init_factors(site: Site, key: jax.Array, init: str, dtype: str) -> tuple[jax.Array, jax.Array]:
    """`(lora_A, lora_B)` of one site, drawn from `key` and the site's path alone.

    - `"kaiming"`: A ~ U(±1/sqrt(fan_in)), B = 0 (PEFT's default: kaiming_uniform with a = sqrt(5)).
    - `"xavier"`: A ~ N(0, 2 / (fan_in + rank)), B = 0 (NeMo's default).
    - `"gaussian"`: A ~ N(0, 1/rank²), B = 0.
    - `"orthogonal"`: both nonzero with A·B = 0 (PEFT's `init_lora_weights="orthogonal"`); rank must be even.
    - `"random"`: A ~ U(±1/sqrt(fan_in)), B ~ U(±1/sqrt(rank)) (PEFT's `init_lora_weights=False`).

    Embeddings have A = 0 and B ~ N(0, 1), as PEFT's, except with `"random"` and `"orthogonal"`. (PEFT's `False` draws
    both factors of an embedding from N(0, 1), a change many times the size of the table.)

    **Raises:** `ValueError` for an odd rank with `"orthogonal"`, and for float64 without JAX's 64-bit mode.
    """
    if dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError(
            f"`{site.name}`: factors in float64 need JAX's 64-bit mode, or they would silently be float32: "
            "`jax.config.update('jax_enable_x64', True)`, or plan with `dtype='float32'`."
        )
    if init == "orthogonal" and site.rank % 2:
        raise ValueError(
            f"`init='orthogonal'` needs an even rank, got {site.rank} for `{site.name}`; use {site.rank + 1}."
        )
    # Without its path, a site says no more than its shapes: layers of one shape share one compilation.
    return _draw(key, np.uint32(site.seed), site=dataclasses.replace(site, path=("",)), init=init, dtype=dtype)


def init_bias(site: Site, key: jax.Array, init: str, dtype: str) -> jax.Array:
    """The bias on B, (*lead, *out): zeros; with `"random"` U(±1/sqrt(rank)), as PEFT's `init_lora_weights=False`."""
    if init != "random":
        return jnp.zeros(site.vector_shape, dtype)
    key = jax.random.fold_in(jax.random.fold_in(key, site.seed), 2)
    return _uniform(key, site.vector_shape, site.rank, dtype)


@functools.partial(jax.jit, static_argnames=("site", "init", "dtype"))
def _draw(key: jax.Array, seed: jax.Array, *, site: Site, init: str, dtype: str) -> tuple[jax.Array, jax.Array]:
    key_a, key_b = jax.random.split(jax.random.fold_in(key, seed))
    a_shape, b_shape, rank = site.a_shape, site.b_shape, site.rank
    fan_in = site.fan_in // site.group
    if init == "orthogonal":
        return _orthogonal(site, key_a, key_b, dtype)
    if init == "random":
        return _uniform(key_a, a_shape, fan_in, dtype), _uniform(key_b, b_shape, rank, dtype)
    if site.op == "embedding":
        return jnp.zeros(a_shape, dtype), jax.random.normal(key_b, b_shape, jnp.float32).astype(dtype)
    if init == "kaiming":
        a = _uniform(key_a, a_shape, fan_in, dtype)
    else:
        std = 1 / rank if init == "gaussian" else math.sqrt(2 / (fan_in + rank))
        a = (std * jax.random.normal(key_a, a_shape, jnp.float32)).astype(dtype)
    return a, jnp.zeros(b_shape, dtype)


def _uniform(key: jax.Array, shape: tuple[int, ...], fan: int, dtype: str) -> jax.Array:
    bound = 1 / math.sqrt(fan)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def _orthogonal(site: Site, key_a: jax.Array, key_b: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    rank, half = site.rank, site.rank // 2
    lead = site.sizes_of("l")
    key_q, key_a = jax.random.split(key_a)
    q = jnp.linalg.qr(jax.random.normal(key_q, (*lead, rank, rank)))[0]
    a = jax.random.normal(key_a, (*lead, site.fan_in, half)) @ q[..., 0::2, :] / 10
    b = jax.random.normal(key_b, (*lead, site.fan_out, half)) @ q[..., 1::2, :] / 10
    b = jnp.swapaxes(b, -1, -2)
    return a.reshape(site.a_shape).astype(dtype), b.reshape(site.b_shape).astype(dtype)
