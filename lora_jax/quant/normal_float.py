"""NormalFloat: blocks of weights as quantiles of a normal distribution; with four bits, the NF4 of QLoRA."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class NormalFloat(NamedTuple):
    """A quantised array: `codes` (uint8, one code a byte, padded to whole blocks), `absmax` one a block."""

    codes: jax.Array
    absmax: jax.Array


def levels(bits: int) -> np.ndarray:
    """The 2**bits levels in [-1, 1], ascending, zero among them, in float64.

    The positive ones are quantiles of 2**(bits-1) + 1 even steps of probability, the negative ones of one step less,
    so that both ends and zero are exact.

    **Source:** Dettmers et al., arXiv:2305.14314, section 3 and appendix E.
    """
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"`bits={bits!r}`: a NormalFloat has 2 to 8 bits.")
    outermost = 1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    half = 2 ** (bits - 1)
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(outermost, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outermost, 0.5, half)[:-1]]
    every = np.sort([*positive, 0.0, *negative])
    return every / every.max()


def quantise(w: jax.Array, bits: int = 4, block: int = 64) -> NormalFloat:
    """The nearest level of every element, in blocks of `block` along the flattened array.

    **Raises:** `ValueError` for bits other than 2 to 8 and blocks smaller than one.
    """
    if block < 1:
        raise ValueError(f"`block={block}` must be a positive whole number, e.g. 64.")
    table = levels(bits)
    flat = jnp.ravel(w).astype(jnp.promote_types(w.dtype, jnp.float32))
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    unit = blocks / jnp.where(absmax == 0, 1, absmax)[:, None]
    between = jnp.asarray((table[1:] + table[:-1]) / 2, unit.dtype)
    return NormalFloat(jnp.searchsorted(between, unit).astype(jnp.uint8), absmax)


def dequantise(quantised: NormalFloat, shape: tuple[int, ...], bits: int = 4) -> jax.Array:
    """The array of `shape` that `quantise` stored, in the dtype of `absmax`."""
    table = jnp.asarray(levels(bits), quantised.absmax.dtype)
    flat = (table[quantised.codes] * quantised.absmax[:, None]).ravel()
    return flat[: math.prod(shape)].reshape(shape)
