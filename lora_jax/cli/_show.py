"""What the commands that print tables or JSON share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def console() -> Any:
    """A rich console that takes no name for markup, and cuts nothing off when it writes to a file or pipe."""
    from rich.console import Console

    made = Console(markup=False, highlight=False)
    return made if made.is_terminal else Console(markup=False, highlight=False, width=1000)


def by(shape: Sequence[int]) -> str:
    """ "8×4096" of (8, 4096)."""
    return "×".join(map(str, shape))


def listed(items: Sequence[str], most: int = 8) -> str:
    """Joins problems or names into one line, the first `most` in full."""
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key of a dotted name: numbers by value, so that layer 10 follows layer 9."""
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in name.split(".")]


def finite(value: Any) -> Any:
    """A copy for JSON, which has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
