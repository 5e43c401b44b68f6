"""What was measured where. Written by `benchmarks/tuned_rows.py`, each row from the line that it cites."""

from __future__ import annotations

from typing import Any, NamedTuple


class Race(NamedTuple):
    """Forward + backward, as ratios to XLA's frozen linear: lines of `benchmarks/results/kernels.jsonl`."""

    device: str
    m: int
    k: int
    n: int
    r: int
    dropped: bool
    xla: float
    kernels: float
    commit: str


class Tiles(NamedTuple):
    """The fastest tiles of a kernel, where they are not the general ones: lines of `.../tuning.jsonl`."""

    device: str
    kernel: str
    shape: dict[str, Any]
    config: dict[str, Any]
    commit: str


RACES: tuple[Race, ...] = (
    Race("NVIDIA H100 80GB HBM3", 8192, 4096, 4096, 16, False, 1.4004, 1.1589, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 8192, 4096, 4096, 16, True, 1.4788, 1.2312, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 8192, 4096, 14336, 16, False, 1.2532, 1.1223, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 8192, 4096, 14336, 16, True, 1.2631, 1.1324, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 256, 4096, 4096, 16, False, 1.5238, 2.4682, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 256, 4096, 4096, 16, True, 1.606, 2.6902, "1188340"),
)  # fmt: skip
TILES: tuple[Tiles, ...] = ()
