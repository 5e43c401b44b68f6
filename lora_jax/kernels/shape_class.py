"""Shapes that are tuned alike. Plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_jax.kernels.gemm_config import padded_rank


@dataclass(frozen=True)
class ShapeClass:
    """One measurement counts for all shapes of a class: M, K and N to the nearest power of two, the padded rank.

    A pass over one matrix has no N: 0.
    """

    m: int
    k: int
    n: int
    rank: int
    dropped: bool = False
    transposed: bool = False


def class_of(m: int, k: int, n: int, rank: int, *, dropped: bool = False, transposed: bool = False) -> ShapeClass:
    return ShapeClass(_nearest(m), _nearest(k), _nearest(n), padded_rank(rank), dropped, transposed)


def distance(one: ShapeClass, other: ShapeClass) -> float:
    """Doublings between two shapes, all together. 1 to 16 is one class of ranks, 64 the next."""
    pairs = ((one.m, other.m), (one.k, other.k), (one.n, other.n), (one.rank, other.rank))
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


def _nearest(size: int) -> int:
    return 1 << round(math.log2(size)) if size else 0
