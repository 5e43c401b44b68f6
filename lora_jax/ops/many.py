"""`y = x·W + scale[i]·(x·A[i])·B[i]`, where every row of a batch has an `i` of its own.

Written for one row, and meant to be mapped: under `jax.vmap` over `x` and `i` the low-rank branch becomes one product
of the batch, in one of three ways.

gathered    copies the chosen factors, one pair for each row, and multiplies row by row. Little arithmetic, but a
            copy of rows·(K + N)·R numbers: right for long rows.
masked      multiplies every row by every slot's factors as one plain product, and zeroes what was not chosen between
            the two factors. slots times the arithmetic and no copy: right for short rows (decoding).
fused       copies as `gathered` does, and computes the whole product by kernels (`many_fused`): for long rows, where
            there are such kernels.

`W` is multiplied once for the whole batch in any case. Letters: K input features, N output features, R rank.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from lora_jax import _compat
from lora_jax.ops.choice import only_xla
from lora_jax.ops.choice_many import FUSED, choose_many, refuse_fused
from lora_jax.ops.contract import Axes, contract, reorder, spread
from lora_jax.ops.contraction import Contraction, compute_dtype, wide
from lora_jax.ops.dropout import dropout
from lora_jax.ops.low_rank import SAVED, reverse_mode_only
from lora_jax.ops.many_fused import FusedMany, fused_product
from lora_jax.ops.matrices import axis_sizes

SLOT, ROW = "slot", "row"
SELECTIONS = ("gathered", "masked", FUSED)
# Multiply-adds that cost as much as moving one number, in bfloat16 on an H100 (989 TFLOP/s, 3.35 TB/s), times a half
# for what is reached. Read from data sheets, not tuned.
BALANCE = 256


class Many(NamedTuple):
    """The axes of both stacks, which have `SLOT` among them; how many slots; and the way, or None to choose one.

    Where `SLOT` lies before the rank, and both before or after all that is summed with `x`, the masked way is one
    plain product: elsewhere the stack is transposed for it at every call.
    """

    first: Axes
    second: Axes
    slots: int
    selection: str | None = None

    def way(self, rows: int, tokens: int) -> str:
        """How `rows` rows of `tokens` tokens each are multiplied."""
        if self.selection not in (None, FUSED):
            return self.selection
        # Each of the chosen factors is read, written and read again; of all of them each is read once, and
        # multiplied by every token.
        masked = self.slots * max(1.0, rows * tokens / BALANCE)
        return "masked" if masked <= 3 * rows else "gathered"


def many_contract(
    spec: Contraction, many: Many, x: jax.Array, w: jax.Array, first: jax.Array, second: jax.Array,
    scale: jax.Array, index: jax.Array, key: jax.Array | None, name: str = "",
) -> jax.Array:  # fmt: skip
    """The adapted product of one row; see the module.

    **Arguments:** `spec` as for `low_rank_contract`, its factors without the slots; `first` and `second`, the stacks;
    `scale` (slots,); `index`, an integer scalar, negative for none; `name`, of the weight, for messages.

    Sums are float32 (float64 for float64); `scale` multiplies the thin one before it is rounded to `x`'s dtype.
    Differentiable in reverse mode by `x`, `w` and both stacks; `scale` has no gradient.

    **Raises:** `ValueError` where kernels are asked for and can't run; `TypeError` in forward mode.
    """
    # Inside `shard_map` a custom derivative must give gradients that vary exactly as its arguments do.
    x, w, first, second, scale, index = _compat.vary_alike(x, w, first, second, scale, index)
    dropped = dropout(x.astype(compute_dtype(x)), key, spec.dropout_rate, spec.columns)
    has_dropout = key is not None and spec.dropout_rate > 0
    with reverse_mode_only():
        return _whole(spec, many, has_dropout, name)(x, dropped, w, first, second, lax.stop_gradient(scale), index)


def _whole(spec: Contraction, many: Many, has_dropout: bool, name: str) -> Any:
    """The product of one row, of which `jax.vmap` makes one on kernels where these can compute it."""

    def by_xla(x: Any, dropped: Any, w: Any, first: Any, second: Any, scale: Any, index: Any) -> jax.Array:
        y = contract(
            x, spec.x, w, spec.w, spec.y, summed=spec.summed, precision=spec.precision,
            preferred_element_type=spec.preferred_element_type, out_sharding=spec.out_sharding,
        )  # fmt: skip
        branch = _branch(spec, many)(dropped, first.astype(dropped.dtype), second.astype(dropped.dtype), scale, index)
        return y + branch.astype(y.dtype)

    @custom_vmap
    def product(*operands: Any) -> jax.Array:
        return by_xla(*operands)

    @product.def_vmap
    def _(size: int, mapped: Any, *operands: Any) -> tuple[jax.Array, bool]:
        x, _, w, first, second, scale, index = operands
        if any(mapped[2:6]):  # a stack for each row: a `vmap` of somebody else's
            what = "a product of rows with weights of their own"
            refuse_fused(what, many.selection, name)
            only_xla(what, None, name)
        else:
            x, index = (
                value if own else jnp.broadcast_to(value, (size, *value.shape))
                for value, own in ((x, mapped[0]), (index, mapped[6]))
            )
            fused = _fused(spec, many, x, w, first, has_dropout, name)
            if fused is not None:
                y: Any = fused_product(fused, x, w, first, second, scale, index)
                return reorder(y, fused.spec.y, (ROW, *spec.y)), True
        return jax.vmap(by_xla, in_axes=tuple(0 if own else None for own in mapped), axis_size=size)(*operands), True

    return product


def _fused(
    spec: Contraction, many: Many, x: jax.Array, w: jax.Array, first: jax.Array, has_dropout: bool, name: str
) -> FusedMany | None:
    """The product of all rows on kernels, its result with the axes of `x` first, or None."""
    # A weight on the left gives them last; whoever wrote it so transposes back, and of two in a row XLA makes none.
    y = (*(name for name in spec.y if name in spec.x), *(name for name in spec.y if name not in spec.x))
    rows = replace(spec, x=(ROW, *spec.x), y=(ROW, *y))
    sizes = axis_sizes((rows.x, x.shape), (rows.w, w.shape), (many.first, first.shape))
    choice = choose_many(rows, sizes, x, w, many.selection, dropped=has_dropout, name=name)
    if choice.matrices is None:
        return None
    return FusedMany(choice.implementation, rows, many.first, many.second, ROW, SLOT, choice.matrices, x.dtype)


def _branch(spec: Contraction, many: Many) -> Any:
    def one(x: Any, first: Any, second: Any, scale: Any, index: Any) -> jax.Array:
        rows: Any = _rows(spec, many._replace(selection="gathered"), x[None], first, second, scale, index[None])
        return rows[0]

    @custom_vmap
    def branch(x: Any, first: Any, second: Any, scale: Any, index: Any) -> jax.Array:
        return one(x, first, second, scale, index)

    @branch.def_vmap
    def _(size: int, mapped: Any, *operands: Any) -> tuple[jax.Array, bool]:
        if any(mapped[1:4]):  # a stack for each row: a `vmap` of somebody else's
            return jax.vmap(one, in_axes=tuple(0 if m else None for m in mapped), axis_size=size)(*operands), True
        x, first, second, scale, index = operands
        x = x if mapped[0] else jnp.broadcast_to(x, (size, *x.shape))
        index = index if mapped[4] else jnp.broadcast_to(index, (size,))
        tokens = math.prod(n for n, name in zip(x.shape[1:], spec.x, strict=True) if name in spec.y)
        chosen = many._replace(selection=many.way(size, tokens))
        return _rows(spec, chosen, x, first, second, scale, index), True

    return branch


class _Operands(NamedTuple):
    """The two factors as one of the ways multiplies by them, and the axes of them and of the thin sum between."""

    first: jax.Array
    first_axes: Axes
    second: jax.Array
    second_axes: Axes
    h_axes: Axes
    on: jax.Array  # (ROW, SLOT), or (ROW,) of gathered factors: where a thin sum was chosen


def _operands(spec: Contraction, many: Many, first: Any, second: Any, index: Any) -> _Operands:
    """Axes of what each row has of its own begin with `ROW`; those of `spec` do not."""
    row = functools.partial(replace, spec, x=(ROW, *spec.x), y=(ROW, *spec.y))
    if many.selection == "masked":
        on = index[:, None] == jnp.arange(many.slots)
        return _Operands(first, many.first, second, many.second, row(first=many.first, second=many.second).h, on)

    def taken(stack: Any, axes: Axes) -> tuple[jax.Array, Axes]:
        return _taken(stack, axes, index), (ROW, *(name for name in axes if name != SLOT))

    return _Operands(*taken(first, many.first), *taken(second, many.second), (ROW, *spec.h), index >= 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(spec: Contraction, many: Many, x: Any, first: Any, second: Any, scale: Any, index: Any) -> jax.Array:
    return _forward(spec, many, x, first, second, scale, index)[0]


def _forward(spec: Contraction, many: Many, x: Any, first: Any, second: Any, scale: Any, index: Any) -> Any:
    """The branch of all rows, and the scaled thin sum of the chosen factors."""
    ops = _operands(spec, many, first, second, index)
    h = contract(
        x, (ROW, *spec.x), ops.first, ops.first_axes, ops.h_axes,
        precision=spec.precision, preferred_element_type=wide(x.dtype),
    )  # fmt: skip
    h = _chosen(h, ops, scale, index).astype(x.dtype)
    y = contract(h, ops.h_axes, ops.second, ops.second_axes, (ROW, *spec.y), precision=spec.precision)
    return _not_of_the_base(y, many, index), h


def _chosen(h: jax.Array, ops: _Operands, scale: jax.Array, index: jax.Array) -> jax.Array:
    """A thin sum times the scale of each row's adapter, and zero where it was not chosen: also where it overflowed."""
    own = scale[jnp.maximum(index, 0)].astype(h.dtype)
    on = spread(ops.on, (ROW, SLOT)[: ops.on.ndim], ops.h_axes)
    return jnp.where(on, h * own.reshape(-1, *(1,) * (h.ndim - 1)), 0)


def _not_of_the_base(y: jax.Array, many: Many, index: jax.Array) -> jax.Array:
    """Zero for rows of the base, which were multiplied by some slot's factors: finite or not."""
    if many.selection == "masked":
        return y
    return jnp.where(index.reshape(-1, *(1,) * (y.ndim - 1)) >= 0, y, 0)


def _fwd(spec: Any, many: Any, x: Any, first: Any, second: Any, scale: Any, index: Any) -> Any:
    y, h = _forward(spec, many, x, first, second, scale, index)
    return y, (x, first, second, scale, index, checkpoint_name(h, SAVED))


def _bwd(spec: Contraction, many: Many, saved: Any, dy: jax.Array) -> Any:
    x, first, second, scale, index, h = saved
    ops = _operands(spec, many, first, second, index)
    pair = functools.partial(contract, precision=spec.precision, preferred_element_type=wide(x.dtype))
    g = pair(dy, (ROW, *spec.y), ops.second, ops.second_axes, ops.h_axes)
    g = _chosen(g, ops, scale, index).astype(x.dtype)
    dx = _not_of_the_base(pair(g, ops.h_axes, ops.first, ops.first_axes, (ROW, *spec.x)), many, index).astype(x.dtype)
    dfirst = pair(x, (ROW, *spec.x), g, ops.h_axes, ops.first_axes)
    dsecond = pair(h, ops.h_axes, dy, (ROW, *spec.y), ops.second_axes)
    if many.selection != "masked":
        dfirst = _summed(dfirst, first.shape, many.first, index)
        dsecond = _summed(dsecond, second.shape, many.second, index)
    return dx, dfirst.astype(first.dtype), dsecond.astype(second.dtype), jnp.zeros_like(scale), None


def _taken(stack: Any, axes: Axes, index: jax.Array) -> jax.Array:
    """A row's factors for each row, (ROW, ...). Indexing by an array would move the slots to the front first."""
    at = axes.index(SLOT)
    return jax.vmap(lambda i: lax.dynamic_index_in_dim(stack, i, at, keepdims=False))(jnp.maximum(index, 0))


def _summed(rows: jax.Array, shape: tuple[int, ...], axes: Axes, index: jax.Array) -> jax.Array:
    """Gradients of rows added up in their slots of a stack; those of the base, which may be NaN, in none."""
    rows = jnp.where((index >= 0).reshape(-1, *(1,) * (rows.ndim - 1)), rows, 0)
    stack = _compat.vary_alike(jnp.zeros(shape, rows.dtype), rows)[0]
    return jax.linear_transpose(lambda stack: _taken(stack, axes, index), stack)(rows)[0]


_rows.defvjp(_fwd, _bwd)


def part_by_part(fn: Any) -> Any:
    """`fn`, of which `jax.vmap` makes a loop over its parts. Unlike `sequential_vmap`'s, it has a reverse mode."""

    @custom_vmap
    def call(*operands: Any) -> Any:
        return fn(*operands)

    @call.def_vmap
    def _(size: int, mapped: Any, *operands: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(operands)
        moving = [i for i, one in enumerate(jax.tree.leaves(mapped)) if one]

        def part(values: Any) -> Any:
            filled = list(leaves)
            for i, value in zip(moving, values, strict=True):
                filled[i] = value
            return fn(*jax.tree.unflatten(tree, filled))

        out = lax.map(part, [leaves[i] for i in moving])
        return out, jax.tree.map(lambda _: True, out)

    return call
