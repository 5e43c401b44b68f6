"""`y = x·W + s·(drop(x)·A)·B` over named axes, with its own derivative.

Every adapted matrix product of a model ends here, whatever its axes: plain, batched, with heads, with the weight
first, or against a transposed weight. Names replace positions, so forward and backward are five two-operand
contractions that differ only in their names.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import _compat
from lora_jax.ops.contract import Axes, contract
from lora_jax.ops.dropout import dropout

IMPLEMENTATIONS = ("xla",)


@dataclass(frozen=True)
class Contraction:
    """The axis names of one adapted product and its static settings.

    `first` is the factor that shares contracted axes with `x`, `second` the other one; which of A and B
    that is depends on the side of the weight that is contracted (a tied head contracts B's). `summed` is the order
    in which `x·w` sums its axes, so that a zero adapter gives the base's very bits; empty for `w`'s order.
    """

    x: Axes
    w: Axes
    first: Axes
    second: Axes
    y: Axes
    summed: Axes = ()
    precision: Any = None
    preferred_element_type: Any = None
    dropout_rate: float = 0.0
    # On meshes with explicit axes: the result's sharding where the model states it, and `x`'s.
    out_sharding: Any = None
    x_sharding: Any = None

    @property
    def h(self) -> Axes:
        """Axes of `x·first`: what the result or the second factor still needs."""
        seen = dict.fromkeys((*self.x, *self.first))
        needed = set(self.y) | set(self.second)
        return tuple(name for name in seen if name in needed)


def low_rank_contract(
    spec: Contraction,
    x: jax.Array,
    w: jax.Array,
    first: jax.Array,
    second: jax.Array,
    scale: float | jax.Array,
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`contract(x, w) + scale * contract(contract(drop(x), first), second)`, of `x·w`'s dtype.

    `first` and `second` are cast to `x`'s dtype; every product accumulates in float32 and is rounded on its own:
    `x·first` to that dtype, then `x·w` and the branch to the result's dtype, and their sum once more (in bfloat16
    an rms error of about 2.6e-3 of the result, where one rounding alone has 1.7e-3). `scale` is folded into
    `second` in float32 (rank·N work, not M·N). The backward pass keeps `x`, the weights and `x·first`, forms the
    gradient of `w` only where somebody asks for it, and nothing of the size of `y` beyond the cotangent itself.
    Reverse mode only (a `custom_vjp`).

    **Raises:** `ValueError` for an unknown `implementation`; `TypeError` in forward mode.
    """
    check_implementation(implementation)
    # Inside `shard_map` a custom derivative must give gradients that vary exactly as its arguments do.
    # A number stays one of numpy's: as an array of jax it would be an operation of its own at every site.
    factor = scale if isinstance(scale, jax.Array) else np.asarray(scale)
    operands = _compat.vary_alike(x, w, first, second, factor.astype(_wide(x.dtype)))
    spec = replace(spec, x_sharding=_compat.explicit_sharding(x))
    # Jitted, so that layers of one shape are traced, differentiated and lowered once between them.
    try:
        return _traced_once(spec, *operands, key)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "the low-rank product has a reverse-mode derivative only, and this is forward mode (`jax.jvp`, "
            "`jax.jacfwd`): use `jax.grad`, `jax.vjp` or `jax.jacrev`, or differentiate the model at "
            "`lora_jax.merge(params, adapter)`, which is the same function."
        ) from error


def check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation={implementation!r}` is not available; use None (choose) or one of {IMPLEMENTATIONS}."
        )


def _compute_dtype(x: jax.Array) -> Any:
    return x.dtype if x.dtype in (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16) else jnp.float32


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def scaled(second: jax.Array, scale: float | jax.Array, dtype: Any) -> jax.Array:
    """`scale * second`, multiplied in float32 (float64 for float64) and rounded once to `dtype`."""
    wide = _wide(dtype)
    return (second.astype(wide) * jnp.asarray(scale, wide)).astype(dtype)


def _down(spec: Contraction, x: jax.Array, first: jax.Array, key: jax.Array | None) -> jax.Array:
    """`drop(x)·first`, accumulated wide and rounded once to the compute dtype."""
    dtype = _compute_dtype(x)
    dropped = dropout(x.astype(dtype), key, spec.dropout_rate)
    wide = contract(
        dropped, spec.x, first.astype(dtype), spec.first, spec.h,
        precision=spec.precision, preferred_element_type=_wide(dtype), out_sharding=_h_sharding(spec),
    )  # fmt: skip
    return wide.astype(dtype)


def _h_sharding(spec: Contraction) -> Any:
    """Split as `x` is; the rank is not."""
    if spec.x_sharding is None:
        return None
    entries = dict(zip(spec.x, spec.x_sharding.spec, strict=False))
    return NamedSharding(spec.x_sharding.mesh, PartitionSpec(*(entries.get(name) for name in spec.h)))


def _gradient_sharding(x: jax.Array, dy: jax.Array) -> Any:
    """That of `x`; where only other operands live on the mesh, a whole copy on each device."""
    return _compat.explicit_sharding(x) or _everywhere(dy)


def _everywhere(dy: jax.Array) -> Any:
    sharding = _compat.explicit_sharding(dy)
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def _forward(spec, x, w, first, second, scale, key):
    y = contract(
        x, spec.x, w, spec.w, spec.y, summed=spec.summed,
        precision=spec.precision, preferred_element_type=spec.preferred_element_type,
        out_sharding=spec.out_sharding,
    )  # fmt: skip
    h = _down(spec, x, first, key)
    up = contract(
        h, spec.h, scaled(second, scale, h.dtype), spec.second, spec.y,
        precision=spec.precision, preferred_element_type=y.dtype, out_sharding=_compat.explicit_sharding(y),
    )  # fmt: skip
    return y + up.astype(y.dtype), h


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank(spec, x, w, first, second, scale, key):
    return _forward(spec, x, w, first, second, scale, key)[0]


def _fwd(spec, x, w, first, second, scale, key):
    y, h = _forward(spec, x.value, w.value, first.value, second.value, scale.value, _value(key))
    # Which gradients are wanted, and x's dtype, told by a shape and not by structure or by leaving residuals out: JAX
    # keeps one structure for an equation, that of the last time it was differentiated, by whichever arguments.
    wanted = (x.perturbed, w.perturbed, first.perturbed, second.perturbed or scale.perturbed)
    flags = jnp.zeros(tuple(map(int, wanted)), x.value.dtype)
    return y, (x.value, w.value, first.value, second.value, scale.value, _value(key), h, flags)


def _value(primal: Any) -> Any:
    return None if primal is None else primal.value


def _bwd(spec, saved, dy):
    x, w, first, second, scale, key, h, flags = saved
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None, None
    wants = dict(zip(("x", "w", "first", "second"), flags.shape, strict=True))
    dtype, wide = h.dtype, _wide(h.dtype)
    dx = dw = dfirst = dsecond = dscale = None
    dy_low = dy.astype(dtype)
    like = functools.partial(_gradient_sharding, dy=dy)
    pair = functools.partial(contract, precision=spec.precision)
    if wants["x"] or wants["first"]:
        up = scaled(second, scale, dtype)
        g = pair(dy_low, spec.y, up, spec.second, spec.h, preferred_element_type=wide, out_sharding=like(h)).astype(
            dtype
        )
    if wants["x"]:
        through_base = pair(
            dy,
            spec.y,
            w,
            spec.w,
            spec.x,
            preferred_element_type=jnp.promote_types(dy.dtype, x.dtype),
            out_sharding=spec.x_sharding or _everywhere(dy),
        )
        through_low = pair(
            g,
            spec.h,
            first.astype(dtype),
            spec.first,
            spec.x,
            preferred_element_type=jnp.promote_types(dy.dtype, x.dtype),
            out_sharding=spec.x_sharding or _everywhere(dy),
        )
        # Linear in its input and with the mask of the forward pass, dropout is its own transpose.
        dx = (through_base + dropout(through_low, key, spec.dropout_rate)).astype(x.dtype)
    if wants["w"]:
        dw = pair(x, spec.x, dy, spec.y, spec.w, preferred_element_type=_wide(w.dtype), out_sharding=like(w)).astype(
            w.dtype
        )
    if wants["first"]:
        dropped = dropout(x.astype(dtype), key, spec.dropout_rate)
        dfirst = pair(
            dropped, spec.x, g, spec.h, spec.first, preferred_element_type=wide, out_sharding=like(first)
        ).astype(first.dtype)
    if wants["second"]:
        unscaled = pair(h, spec.h, dy_low, spec.y, spec.second, preferred_element_type=wide, out_sharding=like(second))
        dsecond = (unscaled * scale.astype(wide)).astype(second.dtype)
        dscale = (unscaled * second.astype(wide)).sum().astype(scale.dtype)
    return dx, dw, dfirst, dsecond, dscale, None


_low_rank.defvjp(_fwd, _bwd, symbolic_zeros=True)
_traced_once = jax.jit(_low_rank, static_argnums=0)
