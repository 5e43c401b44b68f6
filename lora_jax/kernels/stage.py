"""One kernel of a family at one size: what can be tuned of it, and how a candidate's result is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.kernels.counter_bits import STEPS, bits16, rescaling
from lora_jax.kernels.shape_class import ShapeClass


class Expected(NamedTuple):
    """In float32: the value, a bound on its error, and what a plausible mistake would give."""

    value: jax.Array
    bound: jax.Array
    mistake: jax.Array


@dataclass(frozen=True)
class Stage:
    """`run(config, *operands)` gives a result that `expected(*operands)` judges; the general configuration is first.

    `kernel`: a name that no other family has. Who launches it asks `tuned.measured(kernel, shape, candidates)`.
    """

    kernel: str
    shape: ShapeClass
    candidates: Sequence[Any]
    run: Callable[..., jax.Array]
    expected: Callable[..., Expected]
    operands: tuple[jax.Array, ...]


def excess(got: jax.Array, want: jax.Array, bound: jax.Array) -> float:
    """The worst of |got - want| / bound: at most 1 if `got` is right. Infinite for NaN or another shape."""
    return float(_excess(got, want, bound)) if got.shape == want.shape else float("inf")


@jax.jit
def _excess(got: jax.Array, want: jax.Array, bound: jax.Array) -> jax.Array:
    ratio = jnp.abs(got.astype(jnp.float32) - want) / jnp.maximum(bound, jnp.finfo(jnp.float32).tiny)
    return jnp.max(jnp.where(jnp.isnan(ratio), jnp.inf, ratio))


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """In float32, not in a shorter format that stands for it."""
    return jnp.dot(x.astype(jnp.float32), y.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def kept(shape: tuple[int, int], seed: jax.Array, threshold: int) -> jax.Array:
    """0 or 65536 / (65536 - threshold) for each element; 1 where nothing is dropped."""
    if not threshold:
        return jnp.ones((1, 1), jnp.float32)
    assert 0 < threshold < STEPS
    rows, columns = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    drawn = bits16(seed[0], seed[1], rows + seed[2], columns + seed[3])
    return (drawn >= threshold) * jnp.float32(rescaling(threshold))


def roundoff(dtype: Any) -> float:
    """Largest relative error of one rounding to nearest."""
    return float(jnp.finfo(dtype).eps) / 2


# Standard deviations, so to say: errors of independent roundings add up to more with a chance of 2·exp(-LIKELY²/2).
LIKELY = 10.0


def summed(terms: int) -> float:
    """Relative error of a float32 sum of so many products, of the result's and of the expected value's.

    As if roundings were independent and of mean zero. The worst case, with `terms` for its root, is more than all of an
    adapter's effect at the sizes of large models.

    **Source:** Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41
    (2019), to first order.
    """
    return 2 * min(terms, LIKELY * math.sqrt(terms)) * roundoff(jnp.float32)


def added_up(weights: jax.Array, errors: jax.Array) -> jax.Array:
    """A bound on the error of `weightsᵀ·v` where each element of `v` is off by at most `errors`, independently."""
    return LIKELY * jnp.sqrt(product((weights**2).T, errors**2))
