"""Random bits as a function of (seed, row, column): the dropout masks of every implementation.

A counter-based generator needs no state and no storage: forward, backward and rematerialised passes ask for the same
element and get the same bits, and a shard that knows where it starts gets those of its part of the whole. Integers are
what a GPU is slowest at, so most of the work is done once a row and once a column, products do what is left, and one
mixed word serves two columns 64 apart:

    row         key = row * 0x9E3779B9 + seed1              a = fmix(key) | 1
    column      v = pair * 0x85EBCA6B + seed0               b = (v ^ v >> 16) * 0xC2B2AE35 | 1
    element     w = a * b + key                             bits = (w ^ w >> 16) * c >> 16 ^ 0x8000

modulo 2**32, where pair = column >> 7 << 6 | column & 63, c = 0x27D4EB2F if column & 64 else 0xC2B2AE35, and fmix is
MurmurHash3's 32-bit finaliser (Appleby, 2011). That each row adds a key of its own matters: without it, columns whose
`b` are in a small ratio would be dropped together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

STEPS = 65536  # of a rate: what 16 bits tell apart
# 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9 and, for an element's own half, 0x27D4EB2F, as int32.
_MIX1, _MIX2, _ROW = -0x7A143595, -0x3D4D51CB, -0x61C88647
_LOWER, _UPPER = _MIX2, 0x27D4EB2F


def _fmix(v: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser on int32, all arithmetic modulo 2**32."""
    v = _folded(v, 16) * _like(_MIX1, v)
    v = _folded(v, 13) * _like(_MIX2, v)
    return _folded(v, 16)


def _folded(v: jax.Array, shift: int) -> jax.Array:
    return v ^ lax.shift_right_logical(v, _like(shift, v))


def _like(value: int, v: jax.Array) -> jax.Array:
    # In a kernel a scalar is no array.
    return lax.full_like(v, value) if v.ndim else jnp.int32(value)


def words(seed0: jax.Array, seed1: jax.Array, rows: jax.Array, pairs: jax.Array) -> jax.Array:
    """The mixed word of each (row, pair of columns). All int32, of one shape or of none."""
    key = rows * _like(_ROW, rows) + seed1
    column = _folded(pairs * _like(_MIX1, pairs) + seed0, 16) * _like(_MIX2, pairs) | 1
    return _folded((_fmix(key) | 1) * column + key, 16)


def pair(columns: jax.Array) -> jax.Array:
    """Which pair a column belongs to: `c` and `c ^ 64` are of the same. int32."""
    above = lax.shift_left(lax.shift_right_logical(columns, _like(7, columns)), _like(6, columns))
    return above | (columns & 63)


def _factor(upper: bool | jax.Array) -> int | jax.Array:
    """What makes a column's own bits of the word of its pair."""
    if isinstance(upper, bool):
        return _UPPER if upper else _LOWER
    return jnp.where(upper, jnp.int32(_UPPER), jnp.int32(_LOWER))


def survives(word: jax.Array, upper: bool | jax.Array, threshold: int) -> jax.Array:
    """Whether the 16 bits of a pair's lower or upper column, the one with `column & 64`, reach `threshold`.

    The bits are the upper half of a product. So that a comparison does without a shift, and without unsigned numbers,
    the definition has their first one flipped.
    """
    return word * _factor(upper) >= jnp.int32(threshold * STEPS - 2**31)


def bits16(seed0: jax.Array, seed1: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """16 random bits, in the low half of int32, for each (row, column). All int32, of one shape."""
    product = words(seed0, seed1, rows, pair(columns)) * _factor((columns & 64) != 0)
    return lax.shift_right_logical(product, _like(16, product)) ^ 0x8000


def rescaling(threshold: int) -> float:
    """What sums over kept elements are multiplied by, where 16-bit numbers below `threshold` mean "drop"."""
    return STEPS / (STEPS - threshold)
