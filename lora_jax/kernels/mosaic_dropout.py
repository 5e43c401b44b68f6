"""The dropout mask inside Hopper kernels: bits counted out from (seed, row, column), nothing stored.

The formula is that of `counter_bits`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lora_jax.kernels.counter_bits import pair, survives, words
from lora_jax.kernels.mosaic import load


def seeds(seed_g: Any) -> list[Any]:
    """The four int32 of a seed, in registers. To be asked for before a loop, or each step reads them from memory."""
    return [seed_g[i] for i in range(4)]


class Mask:
    """Which elements of a tile survive, a piece of its columns at a time, in the layout of a product's result.

    `seed`: four int32, two seed words and the matrix's origin in the whole one (zeros, unless it is a shard; the column
    a multiple of 128). `aligned`: the tile's first column is a multiple of 128 and not just of 64, so that words can be
    shared.
    """

    def __init__(self, seed: Any, row: Any, column: Any, shape: tuple[int, int], threshold: int, *, aligned: bool):
        self._seed, self._shape, self._threshold, self._aligned = seed, shape, threshold, aligned
        self._column = column + seed[3]
        self._rows = _iota(shape, 0) + (row + seed[2])
        self._words: dict[int, jax.Array] = {}

    def __call__(self, column: int) -> jax.Array:
        """Of the piece that starts `column` columns into the tile; it must not cross a multiple of 64."""
        # One word serves two columns 64 apart: the second of two such pieces finds it here.
        first = column & ~64 if self._aligned else column
        if first not in self._words:
            # All columns of a piece lie in one half of 128, and so do their pairs: one after the other.
            pairs = _iota(self._shape, 1) + pair(self._column + first)
            self._words[first] = words(self._seed[0], self._seed[1], self._rows, pairs)
        upper = bool(column & 64) if self._aligned else ((self._column + column) & 64) != 0
        return survives(self._words[first], upper, self._threshold)


def _iota(shape: tuple[int, int], dimension: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


def mask_in_place(tile: Any, seed: Any, row: Any, column: Any, threshold: int) -> None:
    """Zeroes what is dropped of a tile in shared memory, before products that read it, by rows or by columns.

    The tile is one of a row of such: its first column is a multiple of its width. `seed`: see `seeds`.
    """
    rows, columns = tile.shape
    for i in range(0, rows, 64):
        mask = Mask(seed, row + i, column, (64, 64), threshold, aligned=columns % 128 == 0)
        for j in range(0, columns, 64):
            piece = tile.at[_piece(i, rows), _piece(j, columns)]
            values = load(piece)
            piece[...] = jnp.where(mask(j), values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _piece(start: int, size: int) -> slice:
    return slice(None) if size == 64 else slice(start, start + 64)
