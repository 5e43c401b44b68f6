"""The dropout mask inside Hopper kernels: bits counted out from (seed, row, column), nothing stored.

The formula is that of `counter_bits`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lora_jax.kernels.counter_bits import words
from lora_jax.kernels.mosaic import load


class Mask:
    """Which elements of a tile survive, a piece of its columns at a time, in the layout of a product's result.

    `seed`: reference to four int32 in global memory: two seed words and the matrix's origin in the whole one (zeros,
    unless it is a shard; the column a multiple of 128). `aligned`: the tile's first column is a multiple of 128 and
    not just of 64, so that words can be shared.
    """

    def __init__(self, seed: Any, row: Any, column: Any, shape: tuple[int, int], threshold: int, *, aligned: bool):
        self._seed, self._shape, self._threshold, self._aligned = seed, shape, threshold, aligned
        self._column = column + seed[3]
        self._rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + (row + seed[2])
        self._kept: dict[int, jax.Array] = {}

    def __call__(self, column: int) -> jax.Array:
        """Of the piece that starts `column` columns into the tile; it must not cross a multiple of 64."""
        if not self._aligned:
            word = self._words(column)
            upper = lax.shift_right_logical((self._column + column) & 64, jnp.int32(2))  # 16 or 0
            bits = lax.shift_right_logical(word, jnp.broadcast_to(upper, word.shape))
            return (bits & 0xFFFF) >= jnp.int32(self._threshold)
        # One word serves two columns 64 apart: the second of two such pieces finds it here.
        first = column & ~64
        if first not in self._kept:
            self._kept[first] = self._words(first)
        word = self._kept[first]
        bits = lax.shift_right_logical(word, lax.full_like(word, 16)) if column & 64 else word & 0xFFFF
        return bits >= jnp.int32(self._threshold)

    def _words(self, column: int) -> jax.Array:
        columns = plgpu.broadcasted_iota(jnp.int32, self._shape, 1, layout=plgpu.Layout.WGMMA)
        return words(self._seed[0], self._seed[1], self._rows, columns + (self._column + column))


def mask_in_place(tile: Any, seed: Any, row: Any, column: Any, threshold: int) -> None:
    """Zeroes what is dropped of a tile in shared memory, before products that read it, by rows or by columns.

    The tile is one of a row of such: its first column is a multiple of its width.
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
