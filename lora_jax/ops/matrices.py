"""An adapted product seen as one of matrices, (M, K) x (K, N) or (M, K) x (N, K)ᵀ, without moving anything."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from lora_jax.ops.contract import Axes
from lora_jax.ops.contraction import Contraction


@dataclass(frozen=True)
class Matrices:
    """The axes behind M, K, N and R, those of length one left out, and whether the weight is stored (N, K).

    `flipped`: the result is wanted as (N, M). That is what a product with the weight first gives, and `einsum` may put
    it first and transpose back: two transposes in a row, of which XLA makes none.

    `sizes` goes with `(*rows, *inner, *outer)`.
    """

    rows: Axes
    inner: Axes
    outer: Axes
    rank: Axes
    transposed: bool
    sizes: tuple[int, ...]
    rank_size: int
    flipped: bool = False

    @property
    def size(self) -> dict[Hashable, int]:
        return dict(zip((*self.rows, *self.inner, *self.outer), self.sizes, strict=True))

    def shape(self, axes: Axes) -> tuple[int, ...]:
        size = self.size
        return tuple(size[name] for name in axes)

    @property
    def w_axes(self) -> Axes:
        return (*self.outer, *self.inner) if self.transposed else (*self.inner, *self.outer)

    @property
    def mknr(self) -> tuple[int, int, int, int]:
        m, k, n = (math.prod(self.shape(axes)) for axes in (self.rows, self.inner, self.outer))
        return m, k, n, self.rank_size


def as_matrices(spec: Contraction, sizes: Mapping[Hashable, int]) -> Matrices | str:
    """The view, or the reason why there is none. `sizes`: of every axis."""
    if empty := [name for name in dict.fromkeys((*spec.x, *spec.w, *spec.first)) if sizes[name] == 0]:
        return f"axis {empty[0]} has length 0: nothing to compute"
    shared = set(spec.x) & set(spec.w)
    if any(name in spec.y and sizes[name] > 1 for name in shared):
        return "the data and the weight share a batch axis (experts, stacked layers): many products and not one"
    if lone := [name for name in (*spec.x, *spec.w) if name not in spec.y and name not in shared]:
        return f"axis {lone[0]} of one operand is summed on its own"
    rank = tuple(name for name in spec.first if name not in spec.x and name not in spec.w)

    def long(axes: Axes) -> Axes:
        return tuple(name for name in axes if sizes[name] > 1)

    rows = long(tuple(name for name in spec.x if name in spec.y))
    inner = long(tuple(name for name in spec.x if name not in spec.y))
    outer = long(tuple(name for name in spec.w if name in spec.y))
    if set(long(spec.first)) != {*inner, *long(rank)} or set(long(spec.second)) != {*long(rank), *outer}:
        return "the factors do not split the weight's axes into those the product sums and those it keeps"
    if long(spec.x) != (*rows, *inner):
        return "needs a transpose of the data: its summed axes are not its last ones"
    w = long(spec.w)
    if w not in ((*inner, *outer), (*outer, *inner)):
        return "needs a transpose of the weight: its summed axes are neither first nor last, or in another order"
    y = long(spec.y)
    if y not in ((*rows, *outer), (*outer, *rows)):
        return "needs a transpose of the result: the weight's axes are neither first nor last, or in another order"
    return Matrices(
        rows, inner, outer, rank, transposed=w != (*inner, *outer),
        sizes=tuple(sizes[name] for name in (*rows, *inner, *outer)),
        rank_size=math.prod(sizes[name] for name in rank), flipped=y != (*rows, *outer),
    )  # fmt: skip


def axis_sizes(*operands: tuple[Axes, tuple[int, ...]]) -> dict[Hashable, int]:
    """`{name: length}` from the axes and the shape of each operand."""
    return {name: n for axes, shape in operands for name, n in zip(axes, shape, strict=True)}
