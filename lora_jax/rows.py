"""The rows of a plan's table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_jax.sites import Site

Path = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One parameter of the model: its site if it is adapted, else why it is not."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    site: Site | None
    note: str
    op: str = ""

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def size(self) -> int:
        return math.prod(self.shape)
