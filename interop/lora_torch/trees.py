"""Flax parameter trees as flat lists of named leaves, and back.

Nested dicts, `FrozenDict`s, `nnx.State`s (or the pure dicts of them, with integer keys) and linen's boxed params are
all jax pytrees: their own structure is kept and refilled, so the result has the type and the boxes of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lora_jax._compat import path_names

from .arrays import shape_dtype
from .naming import Path

# Linen collections whose leaves a PyTorch state dict also holds.
_COLLECTIONS = ("params", "batch_stats")


@dataclass(frozen=True)
class Leaf:
    """One array of a tree: `path` without the collection, the `value`, and its shape and dtype."""

    path: Path
    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{'.'.join(self.path)} {self.shape}"


def flatten(tree: Any) -> tuple[list[Leaf], Callable[[Sequence[Any]], Any]]:
    """The leaves of a parameter tree in the tree's order, and the function that puts new values in their places.

    A mapping with `"params"` at its top is a linen variables dict; of its collections `params` and `batch_stats`
    have counterparts in PyTorch.

    **Raises:** `ValueError` for an empty tree or another collection, `TypeError` for a leaf that is no array.
    """
    if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        others = sorted(str(key) for key in tree if key not in _COLLECTIONS)
        if others:
            raise ValueError(
                f"the collections {others} have no PyTorch counterpart; pass only {list(_COLLECTIONS)}, for example "
                '`{"params": variables["params"], "batch_stats": variables["batch_stats"]}`'
            )
        strip = 1
    else:
        strip = 0
    found, treedef = jax.tree_util.tree_flatten_with_path(tree)
    if not found:
        raise ValueError("the parameter tree is empty")
    leaves = []
    for keys, value in found:
        path = path_names(keys)[strip:]
        try:
            shape, dtype = shape_dtype(value)
        except TypeError as error:
            raise TypeError(
                f"{'.'.join(path) or 'the tree itself'}: {error}. Pass arrays only; of an nnx model "
                "`nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))`"
            ) from None
        if not path:
            raise TypeError("a single array has no name; pass a tree such as {'kernel': array}")
        leaves.append(Leaf(path, value, shape, dtype))
    return leaves, treedef.unflatten
