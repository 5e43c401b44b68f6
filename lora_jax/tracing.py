"""One trace of a function of parameters: its jaxpr, and how to get back from flat values to its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax import _compat

Path = tuple[str, ...]


@dataclass
class Traced:
    """A traced call: `jaxpr(consts, inputs) -> flat outputs`, where the first inputs are the parameters.

    `unused` holds the parameters that reach no output, with the reason; `jaxpr` has no equations for them.
    """

    jaxpr: Any
    consts: Sequence[Any]
    inputs: list[Any]
    paths: list[Path]
    rebuild: Callable[[Sequence[Any]], Any]
    unused: dict[Path, str]


def flatten_params(params: Any) -> tuple[list[Path], list[Any], Any]:
    """Paths, leaves and structure of a parameter pytree (nested dicts, boxes, nnx states ...)."""
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    return [_compat.path_names(path) for path, _ in flat], [leaf for _, leaf in flat], tree


def trace(fn: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Traced:
    """Traces `fn(params, *args, **kwargs)`. Arrays are traced; Python values (flags, strings) keep their value."""
    paths, leaves, params_tree = flatten_params(params)
    not_arrays = [".".join(p) for p, x in zip(paths, leaves, strict=True) if not _compat.is_dynamic(x)]
    if not_arrays:
        raise TypeError(f"parameters must be arrays; these are not: {', '.join(not_arrays[:5])}.")
    rest, rest_tree = jax.tree.flatten((tuple(args), dict(kwargs)))
    dynamic = [i for i, leaf in enumerate(rest) if _compat.is_dynamic(leaf)]
    results: list[tuple[Any, list[Any], list[int]]] = []

    def flat(*values: Any) -> list[Any]:
        filled = list(rest)
        for i, value in zip(dynamic, values[len(leaves) :], strict=True):
            filled[i] = value
        inner_args, inner_kwargs = jax.tree.unflatten(rest_tree, filled)
        out = fn(jax.tree.unflatten(params_tree, values[: len(leaves)]), *inner_args, **inner_kwargs)
        out_leaves, out_tree = jax.tree.flatten(out)
        arrays = [i for i, leaf in enumerate(out_leaves) if _compat.is_dynamic(leaf)]
        results.append((out_tree, [None if i in arrays else x for i, x in enumerate(out_leaves)], arrays))
        return [out_leaves[i] for i in arrays]

    inputs = [*leaves, *(rest[i] for i in dynamic)]
    closed = jax.make_jaxpr(flat)(*inputs)
    out_tree, out_static, arrays = results[-1]

    def rebuild(values: Sequence[Any]) -> Any:
        filled = list(out_static)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        return jax.tree.unflatten(out_tree, filled)

    whole, consts = _compat.open_jaxpr(closed)
    jaxpr, live = _compat.live_part(whole)
    read = {id(v) for eqn in whole.eqns for v in eqn.invars}
    unused = {
        path: "used, but reaches no output" if id(var) in read else "never used"
        for path, var, alive in zip(paths, whole.invars, live, strict=False)
        if not alive
    }
    return Traced(jaxpr, consts, inputs, paths, rebuild, unused)
