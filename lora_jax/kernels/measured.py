"""What a row of `tuned_rows.py` says. Plain data."""

from __future__ import annotations

from typing import Any, NamedTuple


class Race(NamedTuple):
    """Forward + backward, as ratios to XLA's frozen linear: lines of `benchmarks/results`."""

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
