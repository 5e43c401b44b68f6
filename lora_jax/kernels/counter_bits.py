"""Random bits as a function of (seed, row, column): the dropout masks of every implementation.

A counter-based generator needs no state and no storage: forward, backward and rematerialised passes ask for the same
element and get the same bits, and a shard that knows where it starts gets those of its part of the whole. One word of
32 bits serves two columns 64 apart, 16 bits each: a rate is kept to 2**-16, and a tile of 128 columns in registers
computes each word once and takes both halves.

The mixing function is MurmurHash3's 32-bit finaliser (Appleby, 2011), applied to the column and then to the row:

    word = fmix(fmix((column >> 7 << 6 | column & 63) ^ seed0) ^ (row * 0x9E3779B9 + seed1))
    bits = word >> 16 if column & 64 else word & 0xFFFF
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

STEPS = 65536  # of a rate: what 16 bits tell apart
_MIX1, _MIX2, _ROW = -0x7A143595, -0x3D4D51CB, -0x61C88647  # 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9 as int32


def _fmix(v: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser on int32, all arithmetic modulo 2**32."""
    v ^= lax.shift_right_logical(v, _like(16, v))
    v *= _like(_MIX1, v)
    v ^= lax.shift_right_logical(v, _like(13, v))
    v *= _like(_MIX2, v)
    return v ^ lax.shift_right_logical(v, _like(16, v))


def _like(value: int, v: jax.Array) -> jax.Array:
    return lax.full_like(v, value)


def words(seed0: jax.Array, seed1: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The 32-bit word of each (row, column); columns `c` and `c ^ 64` have the same. All int32, of one shape."""
    pair = lax.shift_left(lax.shift_right_logical(columns, _like(7, columns)), _like(6, columns))
    by_column = _fmix((pair | (columns & 63)) ^ seed0)
    return _fmix(by_column ^ (rows * _like(_ROW, rows) + seed1))


def bits16(seed0: jax.Array, seed1: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """16 random bits, in the low half of int32, for each (row, column). All int32, of one shape."""
    word = words(seed0, seed1, rows, columns)
    return jnp.where((columns & 64) != 0, lax.shift_right_logical(word, _like(16, word)), word & 0xFFFF)


def rescaling(threshold: int) -> float:
    """What sums over kept elements are multiplied by, where 16-bit numbers below `threshold` mean "drop"."""
    return STEPS / (STEPS - threshold)
