"""`y = x·W + drop(x)·A·B (+ bias)` and its derivative, by XLA: two-operand contractions that differ in their names.

Of one product or of several that share `x` and its mask. These differ in the lengths of the rank and of the axes that
their weights keep; `h` and the first factors' gradients are one contraction for all of them, which reads `x` once.

`up` is the second factor with the scale in it, of the compute dtype. Masks come from `seed`, two int32, or None;
`block` places `x` in the array whose mask it is, where it is a part of one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import _compat
from lora_jax.ops.contract import Axes, contract, reorder
from lora_jax.ops.contraction import Contraction, compute_dtype, wide
from lora_jax.ops.dropout import drop_block, rescaling


class Block(NamedTuple):
    """Where `x` begins in the whole array, and that one's shape."""

    whole: Sequence[int]
    origin: Sequence[int | jax.Array]


class Wants(NamedTuple):
    """Which gradients somebody asked for: those of `x` and of the two factors, of any product."""

    x: bool
    a: bool
    b: bool


Arrays = Sequence[jax.Array]


def forward(
    spec: Contraction, x: jax.Array, ws: Arrays, firsts: Arrays, ups: Arrays, seed: jax.Array | None,
    block: Block | None = None, *, biases: Sequence[jax.Array | None],
) -> tuple[list[jax.Array], list[jax.Array]]:  # fmt: skip
    """The results, and each `h = drop(x)·first` of axes `spec.h` for the way back."""
    bases = [
        contract(
            x, spec.x, w, spec.w, spec.y, summed=spec.summed,
            precision=spec.precision, preferred_element_type=spec.preferred_element_type,
            out_sharding=spec.out_sharding,
        )
        for w in ws
    ]  # fmt: skip
    dtype = compute_dtype(x)
    h = contract(
        _drop(spec, x.astype(dtype), seed, block), spec.x, _joined(spec, firsts, spec.first).astype(dtype), spec.first,
        spec.h, precision=spec.precision, preferred_element_type=wide(dtype), out_sharding=_h_sharding(spec),
    )  # fmt: skip
    hs = _cut(spec, _rescaled(spec, h, seed).astype(dtype), spec.h, firsts)
    ys = []
    for y, h, up, bias in zip(bases, hs, ups, biases, strict=True):
        branch = contract(
            h, spec.h, up, spec.second, spec.y,
            precision=spec.precision, preferred_element_type=y.dtype, out_sharding=_compat.explicit_sharding(y),
        )  # fmt: skip
        rows = [] if bias is None else [_along(spec, bias, y)]
        ys.append(total([y, branch.astype(y.dtype), *rows], y.dtype))
    return ys, hs


def backward(
    spec: Contraction, dys: Arrays, x: jax.Array, ws: Arrays, firsts: Arrays, ups: Arrays,
    hs: Arrays, seed: jax.Array | None, wants: Wants, block: Block | None = None,
) -> tuple[jax.Array | None, list[jax.Array] | None, list[jax.Array] | None]:  # fmt: skip
    """Gradients of `x` in its dtype, of each `first` and each `up` in the wide one."""
    dtype = hs[0].dtype
    lows = [dy.astype(dtype) for dy in dys]
    like = functools.partial(gradient_sharding, dy=dys[0])
    pair = functools.partial(contract, precision=spec.precision)
    dx = dfirsts = dups = None
    if wants.x or wants.a:
        gs = [
            pair(low, spec.y, up, spec.second, spec.h, preferred_element_type=wide(dtype), out_sharding=like(h))
            for low, up, h in zip(lows, ups, hs, strict=True)
        ]
        # Here once for both gradients that pass through the mask: on the thin float32 sum, before it is rounded.
        g = _joined(spec, [_rescaled(spec, g, seed).astype(dtype) for g in gs], spec.h)
    if wants.x:
        kind = {
            "preferred_element_type": functools.reduce(jnp.promote_types, (dy.dtype for dy in dys), x.dtype),
            "out_sharding": spec.x_sharding or _everywhere(dys[0]),
        }
        through = [pair(dy, spec.y, w, spec.w, spec.x, **kind) for dy, w in zip(dys, ws, strict=True)]
        through_low = pair(g, spec.h, _joined(spec, firsts, spec.first).astype(dtype), spec.first, spec.x, **kind)
        # Linear in its input and with the mask of the forward pass, dropout is its own transpose.
        dx = total([*through, _drop(spec, through_low, seed, block)], x.dtype)
    if wants.a:
        dropped = _drop(spec, x.astype(dtype), seed, block)
        dfirst = pair(
            dropped, spec.x, g, spec.h, spec.first, preferred_element_type=wide(dtype), out_sharding=like(firsts[0])
        )
        dfirsts = _cut(spec, dfirst, spec.first, firsts)
    if wants.b:
        dups = [
            pair(h, spec.h, low, spec.y, spec.second, preferred_element_type=wide(dtype), out_sharding=like(up))
            for h, low, up in zip(hs, lows, ups, strict=True)
        ]
    return dx, dfirsts, dups


def weight_gradient(spec: Contraction, x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
    """That of the base weight, of its dtype."""
    dw = contract(
        x, spec.x, dy, spec.y, spec.w, precision=spec.precision,
        preferred_element_type=wide(w.dtype), out_sharding=gradient_sharding(w, dy),
    )  # fmt: skip
    return dw.astype(w.dtype)


def bias_gradient(spec: Contraction, bias: jax.Array, dy: jax.Array) -> jax.Array:
    """`dy` summed over its other axes in float32, then of the bias' dtype."""
    others = tuple(d for d, name in enumerate(spec.y) if name not in spec.bias)
    left = tuple(name for name in spec.y if name in spec.bias)
    return reorder(dy.astype(wide(dy.dtype)).sum(others), left, spec.bias).astype(bias.dtype)


def _joined(spec: Contraction, arrays: Arrays, axes: Axes) -> jax.Array:
    """Those of several products one after the other along the rank."""
    return arrays[0] if len(arrays) == 1 else lax.concatenate(arrays, _rank(spec, axes))


def _cut(spec: Contraction, array: jax.Array, axes: Axes, firsts: Arrays) -> list[jax.Array]:
    """The parts of `_joined` ones, as long as the ranks of `firsts`."""
    if len(firsts) == 1:
        return [array]
    ranks = [first.shape[_rank(spec, spec.first)] for first in firsts]
    return list(lax.split(array, ranks, _rank(spec, axes)))


def _rank(spec: Contraction, axes: Axes) -> int:
    (rank,) = (name for name in spec.first if name not in spec.x)
    return axes.index(rank)


def total(parts: Arrays, dtype: Any) -> jax.Array:
    """Their sum, rounded once."""
    if len(parts) <= 2:
        return sum(parts[1:], start=parts[0]).astype(dtype)
    up = functools.reduce(jnp.promote_types, (wide(part.dtype) for part in parts))
    return functools.reduce(jnp.add, (part.astype(up) for part in parts)).astype(dtype)


def _along(spec: Contraction, bias: jax.Array, y: jax.Array) -> jax.Array:
    """The bias in the shape of `y`, in the wide dtype."""
    names = tuple(name for name in spec.y if name in spec.bias)
    bias = reorder(bias.astype(wide(y.dtype)), spec.bias, names)
    where = tuple(spec.y.index(name) for name in names)
    return lax.broadcast_in_dim(bias, y.shape, where, out_sharding=_compat.explicit_sharding(y))


def _drop(spec: Contraction, x: jax.Array, seed: jax.Array | None, block: Block | None) -> jax.Array:
    if seed is None:
        return x
    where = {} if block is None else block._asdict()
    return drop_block(x, seed, spec.dropout_rate, spec.columns, **where)


def _rescaled(spec: Contraction, sums: jax.Array, seed: jax.Array | None) -> jax.Array:
    return sums if seed is None else sums * jnp.asarray(rescaling(spec.dropout_rate), sums.dtype)


def _h_sharding(spec: Contraction) -> Any:
    """Split as `x` is; the rank is not."""
    if spec.x_sharding is None:
        return None
    entries = dict(zip(spec.x, spec.x_sharding.spec, strict=False))
    return NamedSharding(spec.x_sharding.mesh, PartitionSpec(*(entries.get(name) for name in spec.h)))


def gradient_sharding(x: jax.Array, dy: jax.Array) -> Any:
    """That of `x`; where only other operands live on the mesh, a whole copy on each device."""
    return _compat.explicit_sharding(x) or _everywhere(dy)


def _everywhere(dy: jax.Array) -> Any:
    sharding = _compat.explicit_sharding(dy)
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
