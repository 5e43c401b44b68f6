"""How the products' kernels store a tile: bias and masked tail in float32, one rounding, bulk copies of pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lora_jax.kernels import mosaic
from lora_jax.kernels.counter_bits import rescaling
from lora_jax.kernels.mosaic_dropout import Mask, seeds


def store_tile(
    result: jax.Array,
    y_g: Any,
    y_s: Any,
    row0: Any,
    column0: Any,
    *,
    bias: list[jax.Array],
    seed_g: Any,
    threshold: int,
    low_rank: Callable[[int, int], jax.Array],
) -> None:
    """One warpgroup's float32 sums to `y_g`, from (`row0`, `column0`) on, by way of its `y_s`: (slots, 64, columns).

    `bias`: see `bias_pieces`, or empty. With a seed (see `mosaic_dropout.Mask`), `low_rank(i, j)` is masked, rescaled
    and added: the tail of the 64 rows and the columns of a slot that begin at `i` and `j` of the tile.
    """
    slots, columns = y_s.shape[0], y_s.shape[2]
    height, width = result.shape
    for i in range(0, height, 64):
        mask = None
        if seed_g is not None:
            # Asked for here again, so that no key of a column waits in registers that the sums need.
            mask = Mask(seeds(seed_g), row0 + i, column0, (64, columns), threshold, aligned=width % 128 == 0)
        for number, j in enumerate(range(0, width, columns)):
            value = result[i : i + 64, j : j + columns]
            if mask is not None:
                value += jnp.where(mask(j), low_rank(i, j) * rescaling(threshold), 0.0)
            if bias:
                value += lax.broadcast_in_dim(bias[number].astype(jnp.float32), value.shape, (1,))
            slot = (i // 64 * (width // columns) + number) % slots
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            y_s[slot] = value.astype(y_g.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_s.at[slot], y_g.at[pl.ds(row0 + i, 64), pl.ds(column0 + j, columns)])


def bias_pieces(bias_g: Any, column0: Any, width: int, columns: int) -> list[jax.Array]:
    """The bias of a warpgroup's columns, cut as its stores are, laid out as a row of a product's result.

    To be asked for before the products, so that it waits in registers and they don't wait for it.
    """
    if bias_g is None:
        return []
    return [mosaic.load_row(bias_g.at[pl.ds(column0 + j, columns)]) for j in range(0, width, columns)]


def padded_bias(bias: jax.Array | None, block: int) -> jax.Array | None:
    """A tile may reach beyond N; unlike a bulk copy, a load into registers is not cut there."""
    return None if bias is None else jnp.pad(bias, (0, -bias.shape[0] % block))
