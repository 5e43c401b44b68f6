"""`apply_many`: one batch over several adapters, each part of it with an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax import _compat
from lora_jax.bank import AdapterStack
from lora_jax.functional import apply
from lora_jax.ops.many import SELECTIONS
from lora_jax.planning import Plan
from lora_jax.selected import Selected


def apply_many(fn: Callable[..., Any], plan: Plan, *, selection: str | None = None) -> Callable[..., Any]:
    """`apply_many(fn, plan)(params, stack, ids, *args, key=None, in_axes=0, out_axes=0, **kwargs)`.

    The batch is cut into `len(ids)` equal parts, and part `i` is what `fn` computes for it alone with the adapter in
    slot `ids[i]`: with as many ids as rows each row has its own, with fewer every adapter gets a batch. Nothing of
    the model couples the parts (it is mapped over them), so that statistics over the batch are those of a part.

    **Arguments:**

    - `selection`: how products choose their factors, `"gathered"`, `"masked"` or, on the kernels for Hopper GPUs,
      `"fused"` (see `lora_jax.ops.many`); None decides for each product by its sizes.

    **Arguments of the result:**

    - `params`: the base; `stack`: the `stack` of an `AdapterBank`; `ids`: (n,) integers, `bank.ids([...])`, negative
      for the base. All three may be traced: other adapters, ids and scales run the same program.
    - `args`, `kwargs`: those of `fn`. `in_axes`: for `args`, the axis of the batch, as in `jax.vmap`: an integer, None
      for what all parts share, or a tree of them; scalars are shared in any case. `kwargs` are cut along axis 0.
    - `out_axes`: where results have their batch, an integer or a tree of them; None for results that do not depend on
      the part. Or a function from one part's results, as `jax.ShapeDtypeStruct`s, to that. Scalars of a part (its loss)
      become one array of shape (n,).
    - `key`: turns dropout on; part `i` draws with `jax.random.fold_in(key, i)`.

    **Raises:** `ValueError` if the stack does not fit the plan, a batch cannot be cut into as many parts, an id is none
    of the slots', "fused" is asked of a product that the kernels can't compute, or something is split over explicit
    axes of a mesh. Traced ids are not looked at; beyond the last slot, what they give is undefined.
    """
    if selection is not None and selection not in SELECTIONS:
        raise ValueError(f"`selection={selection!r}` is none of None, {', '.join(map(repr, SELECTIONS))}.")
    adapted = apply(fn, plan)

    def many(
        params: Any, stack: AdapterStack, ids: Any, *args: Any, key: jax.Array | None = None, in_axes: Any = 0,
        out_axes: Any = 0, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not isinstance(stack, AdapterStack):
            hint = "; pass `bank.stack`" if hasattr(stack, "stack") else ""
            raise TypeError(f"`stack` must be an AdapterStack, got {type(stack).__name__}{hint}.")
        if not isinstance(ids, Tracer) and (last := int(np.max(ids, initial=-1))) >= stack.slots:
            raise ValueError(f"`ids` names slot {last}, and the stack has slots 0 to {stack.slots - 1}.")
        ids = jnp.asarray(ids)
        if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"`ids` must be (n,) integers, got {ids.dtype} {ids.shape}: `bank.ids([...])` gives them.")
        _refuse_explicit((params, stack, ids, args, kwargs))
        parts = _Parts(ids.shape[0], (args, kwargs), (in_axes, 0))

        def one(index: Any, own_key: Any, values: Any) -> Any:
            own_args, own_kwargs = parts.filled(values)
            return adapted(params, Selected(stack, index, selection), *own_args, key=own_key, **own_kwargs)

        keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(ids)))
        if callable(out_axes):
            out_axes = out_axes(jax.eval_shape(one, ids[0], None if keys is None else keys[0], parts.first()))
        mapped = jax.tree.map(lambda axis: axis if axis is None else 0, out_axes, is_leaf=_is_none)
        run = jax.vmap(one, in_axes=(0, None if keys is None else 0, parts.axes), out_axes=mapped)
        try:
            out = run(ids, keys, parts.values)
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            raise ValueError(
                "a result that all parts share (`out_axes` None) differs from part to part: batch statistics, or state "
                "with a batch of its own. Say where its batch is, or evaluate without updating it."
            ) from error
        axes = jax.tree.broadcast(out_axes, out, is_leaf=_is_none)
        return jax.tree.map(_joined, out, axes, is_leaf=_is_none)

    return many


def _refuse_explicit(operands: Any) -> None:
    """Raises where something is split over explicit axes: how the chosen factors are split no type says."""
    for leaf in jax.tree.leaves(operands):
        sharding = _compat.explicit_sharding(leaf) if _compat.is_dynamic(leaf) else None
        if sharding is not None and any(sharding.spec):
            raise ValueError(
                f"an operand of shape {tuple(leaf.shape)} is split over explicit axes of a mesh, {sharding.spec}: "
                "`apply_many` can't follow them. Use a mesh whose axes are `jax.sharding.AxisType.Auto`, or call it "
                "inside `jax.shard_map`."
            )


class _Parts:
    """The arrays among some arguments, those with a batch cut into `count` parts along an axis of their own."""

    def __init__(self, count: int, trees: Any, axes: Any):
        leaves, self.tree = jax.tree.flatten(trees)
        placed = jax.tree.leaves(jax.tree.broadcast(axes, trees, is_leaf=_is_none), is_leaf=_is_none)
        self.leaves = leaves
        self.dynamic = [i for i, leaf in enumerate(leaves) if _compat.is_dynamic(leaf)]
        self.axes = [_position(leaves[i], placed[i]) for i in self.dynamic]
        self.values = [
            leaves[i] if axis is None else _cut(leaves[i], axis, count)
            for i, axis in zip(self.dynamic, self.axes, strict=True)
        ]

    def first(self) -> list[Any]:
        """The first part, as shapes."""

        def shape(value: Any, axis: int | None) -> Any:
            return jax.ShapeDtypeStruct(value.shape if axis is None else _without(value.shape, axis), value.dtype)

        return [shape(value, axis) for value, axis in zip(self.values, self.axes, strict=True)]

    def filled(self, values: Sequence[Any]) -> Any:
        out = list(self.leaves)
        for i, value in zip(self.dynamic, values, strict=True):
            out[i] = value
        return jax.tree.unflatten(self.tree, out)


def _position(x: Any, axis: int | None) -> int | None:
    """The axis counted from the front; scalars have none."""
    return None if axis is None or jnp.ndim(x) == 0 else axis + jnp.ndim(x) if axis < 0 else axis


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _cut(x: Any, axis: int, count: int) -> Any:
    if not 0 <= axis < x.ndim or x.shape[axis] % count or not x.shape[axis]:
        raise ValueError(
            f"an argument of shape {tuple(x.shape)} cannot be cut into {count} equal parts along axis {axis}, one for "
            "each of `ids`. Say where its batch is with `in_axes`, None if it has none."
        )
    return jnp.reshape(x, (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :]))


def _joined(x: Any, axis: int | None) -> Any:
    """(parts, ..., batch of a part, ...) with the parts' batches one after the other; scalars of a part as they are."""
    if axis is None or x.ndim <= 1:
        return x
    at = axis % (x.ndim - 1)
    x = jnp.moveaxis(x, 0, at)
    return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])


def _is_none(x: Any) -> bool:
    return x is None
