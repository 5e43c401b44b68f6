"""Dropout of the low-rank branch's input, by bits counted out from (seed, row, column).

`lora_jax/kernels/counter_bits.py` is the generator of every implementation, so that they all drop the same elements.
Seen as a matrix, an array has the axes that a product contracts as its columns and all others as its rows, each
flattened in the array's own order. Of that matrix an element is dropped where its 16 bits lie below
`rate * 65536`, rounded. Only its own position counts: the mask is the same under `jit`, `scan` and `remat`, and
whichever part of the array a device holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import _compat
from lora_jax.kernels import counter_bits
from lora_jax.kernels.counter_bits import STEPS, bits16


def dropout(x: jax.Array, key: jax.Array | None, rate: float, columns: Sequence[int] = (-1,)) -> jax.Array:
    """Zeroes each element with probability `rate` and divides the rest by `1 - rate`; `key=None` is the identity.

    `columns`: the axes that the product contracts. The rate is kept to 2**-16 and the division is by what is kept
    exactly: `(65536 - threshold) / 65536`. Under `vmap` a position is one in the mapped array: with one key for all
    of them, all get one mask.

    **Raises:** `ValueError` for a rate that is not 0 and rounds to 0 or to 1.
    """
    if key is None or rate == 0:
        return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (drop(x, key, rate, columns).astype(wide) * np.asarray(rescaling(rate), wide)).astype(x.dtype)


def drop(x: jax.Array, key: jax.Array | None, rate: float, columns: Sequence[int] = (-1,)) -> jax.Array:
    """Like `dropout`, without the division: products apply it to their float32 sums, where it rounds less."""
    return x if key is None or rate == 0 else drop_block(x, seed_words(key), rate, columns)


def drop_block(
    x: jax.Array,
    seed: jax.Array,
    rate: float,
    columns: Sequence[int],
    *,
    whole: Sequence[int] | None = None,
    origin: Sequence[int | jax.Array] | None = None,
) -> jax.Array:
    """`drop` for the seed words of a key; `x` may be the block at `origin` of an array of shape `whole`."""
    keep = keeps(seed, x.shape, columns, threshold(rate), whole=whole, origin=origin)
    return jnp.where(_compat.laid_out_as(keep, x), x, jnp.zeros((), x.dtype))


def rescaling(rate: float) -> float:
    """What sums over kept elements are multiplied by: 1 over the share that is kept."""
    return counter_bits.rescaling(threshold(rate)) if rate else 1.0


def threshold(rate: float) -> int:
    """16-bit numbers below this one mean "drop". **Raises:** `ValueError`, as `dropout` does."""
    steps = round(rate * STEPS)
    if not 0 < steps < STEPS:
        raise ValueError(
            f"a dropout rate of {rate} rounds to {steps}/{STEPS}: rates are kept to 1/{STEPS}. Use 0 for no dropout, "
            f"or a rate from {1 / STEPS:.2g} to 1 - {1 / STEPS:.2g}."
        )
    return steps


def seed_words(key: jax.Array) -> jax.Array:
    """The two int32 words that stand for a PRNG key."""
    return lax.bitcast_convert_type(jax.random.bits(key, (2,), jnp.uint32), jnp.int32)


def keeps(
    seed: jax.Array,
    shape: Sequence[int],
    columns: Sequence[int],
    below: int,
    *,
    whole: Sequence[int] | None = None,
    origin: Sequence[int | jax.Array] | None = None,
) -> jax.Array:
    """Which elements are kept of an array of this shape, or of the block of it at `origin` in one of shape `whole`."""
    whole, origin = whole or shape, origin or (0,) * len(shape)
    contracted = {axis % len(shape) for axis in columns}
    inner = [d for d in range(len(shape)) if d in contracted]
    outer = [d for d in range(len(shape)) if d not in contracted]
    rows, cols = (_flat_index(shape, axes, whole, origin) for axes in (outer, inner))
    return bits16(seed[0], seed[1], rows, cols) >= np.int32(below)


def _flat_index(
    shape: Sequence[int], axes: Sequence[int], whole: Sequence[int], origin: Sequence[int | jax.Array]
) -> jax.Array:
    """Row-major index over `axes` in `whole`. Sums of iotas and no reshape, so that the compiler can split it."""
    index = jnp.zeros(tuple(shape), jnp.int32)
    for i, axis in enumerate(axes):
        stride = math.prod(whole[d] for d in axes[i + 1 :])
        position = lax.broadcasted_iota(jnp.int32, tuple(shape), axis) + jnp.asarray(origin[axis], jnp.int32)
        index += position * np.int32(stride)
    return index
