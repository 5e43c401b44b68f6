"""Products on fused kernels, described: their operands as matrices, and how `h` lies in memory.

One product, or several of one `x` under one mask: where the family has kernels for several, `h` of all is one array.
`fused_devices` computes them where operands may be split over devices, `fused_part` on one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_jax.ops.contract import Axes
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.families import group_kernels, kernels
from lora_jax.ops.matrices import Matrices

RANK, THIN = "rank", "thin"  # `THIN`: the rank as the kernels pad it


@dataclass(frozen=True)
class Fused:
    """Products of one `x` on one family of kernels. Operands have the axes of `matrices`, lengths of one left out.

    `matrices`: of each product, alike but for the lengths of what its weight keeps and of its rank. `together`: by the
    family's kernels for several.
    """

    family: str
    matrices: tuple[Matrices, ...]
    dropout_rate: float
    dtype: Any
    together: bool = False

    @property
    def spec(self) -> Contraction:
        """Of each product."""
        m = self.one
        return Contraction(
            x=self.x, w=m.w_axes, first=(*m.inner, RANK), second=(RANK, *m.outer), y=self.y, bias=m.outer,
            summed=m.inner, dropout_rate=self.dropout_rate,
        )  # fmt: skip

    @property
    def one(self) -> Matrices:
        """A product: its axes are every one's."""
        return self.matrices[0]

    @property
    def x(self) -> Axes:
        return (*self.one.rows, *self.one.inner)

    @property
    def y(self) -> Axes:
        return (*self.one.rows, *self.one.outer)

    @property
    def hs(self) -> list[Axes]:
        rows = self.one.rows
        return [
            self.each((THIN, *rows) if rank_first else (*rows, THIN))[i]
            for i, (rank_first, _) in enumerate(self.layouts)
        ]

    @property
    def layouts(self) -> list[tuple[bool, list[int]]]:
        """Of each array with an `h`, or several: whether the ranks come first, and how many each has."""
        ranks = [m.rank_size for m in self.matrices]
        if self.together:
            return [group_kernels(self.family).h_layout(ranks)]
        found = [kernels(self.family).h_layout(rank) for rank in ranks]
        return [(rank_first, [thin]) for rank_first, thin in found]

    def each(self, axes: Axes) -> list[Axes]:
        """The axes of each product's operand; what others don't share has a name of its own."""
        return [
            tuple(axis if axis in self.x else mine for axis, mine in zip(axes, own(i, axes), strict=True))
            for i in range(len(self.matrices))
        ]


def own(number: int, axes: Axes) -> Axes:
    """The axes of the operand of this number that it alone has; the first's have the plain names."""
    return axes if number == 0 else tuple((axis, number) for axis in axes)
