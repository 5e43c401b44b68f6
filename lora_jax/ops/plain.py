"""`y = x·W + drop(x)·A·B (+ bias)` and its derivative, by XLA: two-operand contractions that differ in their names.

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
from lora_jax.ops.contract import contract, reorder
from lora_jax.ops.contraction import Contraction, compute_dtype, wide
from lora_jax.ops.dropout import drop_block, rescaling


class Block(NamedTuple):
    """Where `x` begins in the whole array, and that one's shape."""

    whole: Sequence[int]
    origin: Sequence[int | jax.Array]


class Wants(NamedTuple):
    """Which gradients somebody asked for: those of `x` and of the two factors."""

    x: bool
    a: bool
    b: bool


def forward(
    spec: Contraction, x: jax.Array, w: jax.Array, first: jax.Array, up: jax.Array, seed: jax.Array | None,
    block: Block | None = None, bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The result, and `h = drop(x)·first` of axes `spec.h` for the way back."""
    y = contract(
        x, spec.x, w, spec.w, spec.y, summed=spec.summed,
        precision=spec.precision, preferred_element_type=spec.preferred_element_type,
        out_sharding=spec.out_sharding,
    )  # fmt: skip
    dtype = compute_dtype(x)
    h = contract(
        _drop(spec, x.astype(dtype), seed, block), spec.x, first.astype(dtype), spec.first, spec.h,
        precision=spec.precision, preferred_element_type=wide(dtype), out_sharding=_h_sharding(spec),
    )  # fmt: skip
    h = _rescaled(spec, h, seed).astype(dtype)
    branch = contract(
        h, spec.h, up, spec.second, spec.y,
        precision=spec.precision, preferred_element_type=y.dtype, out_sharding=_compat.explicit_sharding(y),
    )  # fmt: skip
    if bias is None:
        return y + branch.astype(y.dtype), h
    up = wide(y.dtype)
    where = tuple(spec.y.index(name) for name in spec.bias)
    if list(where) != sorted(where):
        bias, where = reorder(bias, where, sorted(where)), tuple(sorted(where))
    row = lax.broadcast_in_dim(bias.astype(up), y.shape, where, out_sharding=_compat.explicit_sharding(y))
    return (y.astype(up) + branch.astype(up) + row).astype(y.dtype), h


def backward(
    spec: Contraction, dy: jax.Array, x: jax.Array, w: jax.Array, first: jax.Array, up: jax.Array,
    h: jax.Array, seed: jax.Array | None, wants: Wants, block: Block | None = None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:  # fmt: skip
    """Gradients of `x` in its dtype, of `first` and `up` in the wide one."""
    dtype = h.dtype
    low = dy.astype(dtype)
    like = functools.partial(gradient_sharding, dy=dy)
    pair = functools.partial(contract, precision=spec.precision)
    dx = dfirst = dup = None
    if wants.x or wants.a:
        g = pair(low, spec.y, up, spec.second, spec.h, preferred_element_type=wide(dtype), out_sharding=like(h))
        # Here once for both gradients that pass through the mask: on the thin float32 sum, before it is rounded.
        g = _rescaled(spec, g, seed).astype(dtype)
    if wants.x:
        kind = {
            "preferred_element_type": jnp.promote_types(dy.dtype, x.dtype),
            "out_sharding": spec.x_sharding or _everywhere(dy),
        }
        through_base = pair(dy, spec.y, w, spec.w, spec.x, **kind)
        through_low = pair(g, spec.h, first.astype(dtype), spec.first, spec.x, **kind)
        # Linear in its input and with the mask of the forward pass, dropout is its own transpose.
        dx = (through_base + _drop(spec, through_low, seed, block)).astype(x.dtype)
    if wants.a:
        dropped = _drop(spec, x.astype(dtype), seed, block)
        dfirst = pair(
            dropped, spec.x, g, spec.h, spec.first, preferred_element_type=wide(dtype), out_sharding=like(first)
        )
    if wants.b:
        dup = pair(h, spec.h, low, spec.y, spec.second, preferred_element_type=wide(dtype), out_sharding=like(up))
    return dx, dfirst, dup


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
