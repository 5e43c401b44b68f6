"""Batches as a user's iterator yields them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of a batch: a tuple or list of arguments, a dictionary of keyword arguments, or one argument."""
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    return (batch,), {}
