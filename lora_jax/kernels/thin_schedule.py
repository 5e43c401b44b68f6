"""Who computes which part of `h` when `mosaic_adapted` computes it inside the product, and in which order tiles come.

A grid of persistent clusters walks an output of `rows` x `columns` cluster tiles. The tiles of the first
`first_columns` columns come first, row by row within a column, as many columns as fill the clusters once. The tile of
column c sums its rows' share of `h` over the c-th part of the `steps` along K. The others follow in a snake.

Plain numbers: nothing of Pallas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ThinSchedule:
    rows: int
    columns: int
    steps: int
    clusters: int
    stages: int  # of the ring: a part of K is at least as long

    @property
    def first_columns(self) -> int:
        return max(1, min(self.clusters // self.rows, self.columns, self.steps // self.stages))

    @property
    def firsts(self) -> int:
        """Tiles that compute a share of `h`."""
        return self.rows * self.first_columns

    def share(self, column: Any) -> tuple[Any, Any]:
        """The steps over which a tile of this column, a number or a traced one, sums `h`."""
        first, after = column * self.steps, (column + 1) * self.steps
        return first // self.first_columns, after // self.first_columns

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    @property
    def one_first_each(self) -> bool:
        """Whether no cluster has two of the first tiles. Else there is one first column."""
        return self.firsts <= self.clusters
