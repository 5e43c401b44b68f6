"""Layers that stand several times in a deeper model, sharing their weights and not their adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import _compat


def replicate_layers(params: Any, layers: str, ranges: Sequence[Sequence[int]], *, axis: int = 0) -> Any:
    """Parameters for a model that runs its layers by `ranges`: `[[0, 4], [2, 5]]` is 0 1 2 3 2 3 4.

    Build the model with that many layers, and adapt it with these parameters. Every layer then has factors of its own.
    Weights of repeated layers are the same arrays, not copies, and so cannot be merged into. Of layers stacked along an
    axis, as under `nn.scan`, the stack is a new and larger one.

    **Arguments:**

    - `params`: nested mappings.
    - `layers`: the dotted path of the list, `"model.layers"`: a mapping of numbers to layers, the stem of numbered
      names (`layers` for `layers_0`, `layers_1`), or a subtree of stacked arrays.
    - `axis`: along which they are stacked.

    **Raises:** `ValueError` for a path or a range that is not there.

    **Source:** `layer_replication` of PEFT 0.21; "self-merges" such as SOLAR's depth up-scaling, arXiv:2312.15166.
    """
    *parents, last = layers.split(".")
    outer: list[tuple[Mapping[str, Any], str]] = []
    node = params
    for part in parents:
        outer.append((node, part))
        node = _child(node, part, layers)
    new = _replaced(node, last, layers, ranges, axis)
    for parent, part in reversed(outer):
        new = {**parent, part: new}
    return new


def _replaced(node: Any, last: str, layers: str, ranges: Sequence[Sequence[int]], axis: int) -> dict[Any, Any]:
    """The mapping that holds the list, with the new list."""
    if isinstance(node, Mapping):
        numbered = {key: int(m.group(1)) for key in node if (m := re.fullmatch(rf"{re.escape(last)}_(\d+)", str(key)))}
        if numbered and last not in node:
            order = _order(ranges, len(numbered), layers)
            kept = {key: value for key, value in node.items() if key not in numbered}
            return {**kept, **{f"{last}_{n}": node[f"{last}_{i}"] for n, i in enumerate(order)}}
    stack = _child(node, last, layers)
    if isinstance(stack, Mapping) and stack and all(str(key).isdigit() for key in stack):
        order = _order(ranges, len(stack), layers)
        by_number = {int(key): value for key, value in stack.items()}
        kind = type(next(iter(stack)))
        return {**node, last: {kind(n): by_number[i] for n, i in enumerate(order)}}
    lengths = {leaf.shape[axis] if leaf.ndim else 0 for leaf in jax.tree.leaves(stack)}
    inside = {part for path, _ in jax.tree_util.tree_leaves_with_path(stack) for part in _compat.path_names(path)}
    if len(lengths) != 1 or any(re.search(r"(^|_)\d+$", part) for part in inside):
        raise ValueError(
            f"`{layers}` holds neither numbered layers nor arrays stacked along axis {axis} (lengths "
            f"{sorted(lengths)}); name the list itself, e.g. 'model.layers'."
        )
    order = jnp.asarray(_order(ranges, lengths.pop(), layers))
    return {**node, last: jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=axis), stack)}


def _order(ranges: Sequence[Sequence[int]], count: int, layers: str) -> list[int]:
    order = []
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= count:
            raise ValueError(f"{list(pair)} is no range [start, end) of the {count} layers of `{layers}`.")
        order += range(*pair)
    if not order:
        raise ValueError("`ranges` is empty, so no layer is left; write e.g. [[0, 4], [2, 5]].")
    return order


def _child(node: Any, part: str, layers: str) -> Any:
    if not isinstance(node, Mapping) or part not in node:
        found = ", ".join(map(str, node)) if isinstance(node, Mapping) else type(node).__name__
        raise ValueError(f"`{layers}`: there is no `{part}`, only {found}.")
    return node[part]
