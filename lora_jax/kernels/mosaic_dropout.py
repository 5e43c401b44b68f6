"""The dropout mask inside Hopper kernels: bits counted out from (seed, row, column), nothing stored.

The formula is that of `lora_jax/ops/dropout.py`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lora_jax.kernels.counter_bits import bits16


def keep(seed: Any, row: Any, column: Any, shape: tuple[int, int], threshold: int) -> jax.Array:
    """Which elements of the tile at (row, column) survive, in the layout of a product's operand or result.

    `seed`: reference to four int32 in global memory: two seed words and the tile's origin in the whole matrix.
    """
    rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + (row + seed[2])
    columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + (column + seed[3])
    return bits16(seed[0], seed[1], rows, columns) >= jnp.int32(threshold)


def mask_in_place(tile: Any, seed: Any, row: Any, column: Any, threshold: int) -> None:
    """Zeroes what is dropped of a tile in shared memory, before products that read it, by rows or by columns."""
    values = plgpu.load(tile, layout=plgpu.Layout.WGMMA)
    tile[...] = jnp.where(keep(seed, row, column, tile.shape, threshold), values, jnp.zeros_like(values))
    plgpu.commit_smem()
