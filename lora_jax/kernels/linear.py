"""What the linear layer of every family of kernels takes beside its matrices."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Drop(NamedTuple):
    """Dropout of the low-rank branch: four int32, and how many of 65536 are dropped.

    The four are the two words of a seed, and of the first element of `x` the row and the column in the whole array, the
    column a multiple of 128 (see `counter_bits`).
    """

    seed: jax.Array
    threshold: int


class Wants(NamedTuple):
    """Which gradients somebody asked for."""

    x: bool = True
    a: bool = True
    b: bool = True
