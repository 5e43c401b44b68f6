"""`y = x·W + s·(drop(x)·A)·B (+ bias)` over named axes, with its own derivative.

Every adapted matrix product of a model ends here, whatever its axes: plain, batched, with heads, with the weight
first, or against a transposed weight. Names replace positions. One `custom_vjp` serves every implementation: XLA's five
contractions (`plain`) and the fused kernels (`fused`) take the same operands and keep the same residuals.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import _compat
from lora_jax.ops import plain
from lora_jax.ops.choice import choose
from lora_jax.ops.contract import Axes, reorder
from lora_jax.ops.contraction import Contraction, compute_dtype, wide
from lora_jax.ops.dropout import seed_words
from lora_jax.ops.fused import Fused
from lora_jax.ops.matrices import axis_sizes
from lora_jax.ops.plain import Wants


def low_rank_contract(
    spec: Contraction,
    x: jax.Array,
    w: jax.Array,
    first: jax.Array,
    second: jax.Array,
    scale: float | jax.Array,
    key: jax.Array | None = None,
    implementation: str | None = None,
    name: str = "",
    *,
    bias: jax.Array | None = None,
) -> jax.Array:
    """`contract(x, w) + scale * contract(contract(drop(x), first), second) (+ bias)`, of `x·w`'s dtype.

    `first` and `second` are cast to `x`'s dtype; every product accumulates in float32. By XLA each is rounded on its
    own: `x·first` to that dtype, then `x·w` and the branch to the result's dtype, and their sum once more (in bfloat16
    an rms error of about 2.6e-3 of the result, where one rounding alone has 1.7e-3); kernels round the sum alone.
    `bias`, of axes `spec.bias`, is added in float32 to what is summed last. Inside `shard_map` a row-parallel caller,
    who adds the results of several devices, gives it to one of them.
    `scale` is folded into `second` in float32 (rank·N work, not M·N). The backward pass keeps `x`, the weights and
    `x·first`, forms the gradient of `w` only where somebody asks for it, and nothing of the size of `y` beyond the
    cotangent itself. Reverse mode only (a `custom_vjp`).

    `implementation`: see `choice.choose`. `name`: of the weight, for messages.

    **Raises:** `ValueError` for an unknown `implementation`, or one that can't run, with the reason; `TypeError` in
    forward mode.
    """
    sizes = axis_sizes((spec.x, x.shape), (spec.w, w.shape), (spec.first, first.shape), (spec.second, second.shape))
    seed = None if key is None or spec.dropout_rate == 0 else seed_words(key)
    choice = choose(spec, sizes, x, w, implementation, dropped=seed is not None, name=name)
    # Inside `shard_map` a custom derivative must give gradients that vary exactly as its arguments do.
    # A number stays one of numpy's: as an array of jax it would be an operation of its own at every site.
    factor = scale if isinstance(scale, jax.Array) else np.asarray(scale)
    operands = _compat.vary_alike(x, w, first, second, factor.astype(wide(x.dtype)), bias)
    spec = replace(spec, x_sharding=_compat.explicit_sharding(x))
    fused = None
    if choice.implementation != "xla":
        rate = 0.0 if seed is None else spec.dropout_rate
        fused = Fused(choice.implementation, choice.matrices, rate, x.dtype)
    # Jitted, so that layers of one shape are traced, differentiated and lowered once between them.
    try:
        return _traced_once(_Product(spec, fused), *operands, seed)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "the low-rank product has a reverse-mode derivative only, and this is forward mode (`jax.jvp`, "
            "`jax.jacfwd`): use `jax.grad`, `jax.vjp` or `jax.jacrev`, or differentiate the model at "
            "`lora_jax.merge(params, adapter)`, which is the same function."
        ) from error


def scaled(second: jax.Array, scale: float | jax.Array, dtype: Any) -> jax.Array:
    """`scale * second`, multiplied in float32 (float64 for float64) and rounded once to `dtype`."""
    up = wide(dtype)
    return (second.astype(up) * jnp.asarray(scale, up)).astype(dtype)


@dataclass(frozen=True)
class _Product:
    """A contraction and what computes it."""

    spec: Contraction
    fused: Fused | None

    def forward(self, x: Any, w: Any, first: Any, up: Any, bias: Any, seed: Any) -> tuple[jax.Array, jax.Array]:
        """`(y, h)`: the result and what the way back needs."""
        spec, fused = self.spec, self.fused
        if fused is None:
            return plain.forward(spec, x, w, first, up, seed, bias=bias)
        m = fused.matrices
        if bias is not None:
            bias = _order(bias if bias.dtype == x.dtype else bias.astype(wide(x.dtype)), spec.bias, m.outer)
        y, h = fused.forward(_short(x), _short(w), *self._factors(first, up), bias, seed)
        y = reorder(y, fused.y, (*m.outer, *m.rows)) if m.flipped else y
        return y.reshape(_shape(spec.y, (spec.x, x), (spec.w, w))), h

    def backward(
        self, dy: Any, x: Any, w: Any, first: Any, up: Any, h: Any, seed: Any, wants: Wants
    ) -> tuple[Any, Any, Any]:
        """Gradients of `x`, `first` and `up`, the last two in the wide dtype."""
        spec, fused = self.spec, self.fused
        if fused is None:
            return plain.backward(spec, dy, x, w, first, up, h, seed, wants)
        a, b = self._factors(first, up)
        dx, da, db = fused.backward(_order(dy, spec.y, fused.y), _short(x), _short(w), a, b, h, seed, wants)
        inner, outer = fused.matrices.inner, fused.matrices.outer
        if dx is not None:
            dx = _laid_out(dx.reshape(_shape(spec.x, (spec.y, dy), (spec.w, w))), spec.x_sharding)
        if da is not None:
            da = self._unfold(da, (*inner, *fused.matrices.rank), spec.first, first)
            da = _laid_out(da, plain.gradient_sharding(first, dy))
        if db is not None:
            db = self._unfold(db, (*fused.matrices.rank, *outer), spec.second, up)
            db = _laid_out(db, plain.gradient_sharding(up, dy))
        return dx, da, db

    def _factors(self, first: Any, up: Any) -> tuple[jax.Array, jax.Array]:
        """(*inner, R) and (R, *outer), thin copies."""
        assert self.fused is not None
        m = self.fused.matrices
        a, b = _order(first, self.spec.first, (*m.inner, *m.rank)), _order(up, self.spec.second, (*m.rank, *m.outer))
        return (
            a.reshape(*m.shape(m.inner), m.rank_size).astype(self.fused.dtype),
            b.reshape(m.rank_size, *m.shape(m.outer)),
        )

    def _unfold(self, gradient: jax.Array, axes: Axes, to: Axes, like: Any) -> jax.Array:
        """From (*inner, R) or (R, *outer) to the factor's own axes."""
        sizes = axis_sizes((to, like.shape))
        order = tuple(name for name in to if name in axes)
        gradient = gradient.reshape([sizes[name] for name in axes])
        return reorder(gradient, axes, order).reshape(like.shape)


def _laid_out(x: jax.Array, sharding: Any) -> jax.Array:
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _short(x: jax.Array) -> jax.Array:
    """Without axes of length one."""
    return lax.squeeze(x, [d for d, n in enumerate(x.shape) if n == 1])


def _order(x: jax.Array, axes: Axes, to: Axes) -> jax.Array:
    """`x` with the axes `to`; those that are left out have length one."""
    x = lax.squeeze(x, [d for d, name in enumerate(axes) if name not in to])
    return reorder(x, tuple(name for name in axes if name in to), to)


def _shape(axes: Axes, *operands: tuple[Axes, Any]) -> tuple[int, ...]:
    sizes = axis_sizes(*((names, x.shape) for names, x in operands))
    return tuple(sizes[name] for name in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank(product, x, w, first, second, scale, bias, seed):
    return product.forward(x, w, first, scaled(second, scale, compute_dtype(x)), bias, seed)[0]


def _fwd(product, x, w, first, second, scale, bias, seed):
    up = scaled(second.value, scale.value, compute_dtype(x.value))
    of_bias = bias is not None and bias.perturbed
    bias, seed = (None if v is None else v.value for v in (bias, seed))
    y, h = product.forward(x.value, w.value, first.value, up, bias, seed)
    # Which gradients are wanted, and x's dtype, told by a shape and not by structure or by leaving residuals out: JAX
    # keeps one structure for an equation, that of the last time it was differentiated, by whichever arguments.
    wanted = (x.perturbed, w.perturbed, first.perturbed, second.perturbed or scale.perturbed, of_bias)
    flags = jnp.zeros(tuple(map(int, wanted)), x.value.dtype)
    return y, (x.value, w.value, first.value, second.value, scale.value, bias, seed, h, flags)


def _bwd(product, saved, dy):
    x, w, first, second, scale, bias, seed, h, flags = saved
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None, None, None
    of_x, of_w, of_first, of_second, of_bias = map(bool, flags.shape)
    wants = Wants(of_x, of_first, of_second)
    up = scaled(second, scale, compute_dtype(x))
    dx = dw = dfirst = dsecond = dscale = dbias = None
    if any(wants):
        dx, dfirst, dup = product.backward(dy, x, w, first, up, h, seed, wants)
        if dfirst is not None:
            dfirst = dfirst.astype(first.dtype)
        if dup is not None:
            dsecond = (dup * scale.astype(dup.dtype)).astype(second.dtype)
            dscale = (dup * second.astype(dup.dtype)).sum().astype(scale.dtype)
    if of_w:
        dw = plain.weight_gradient(product.spec, x, w, dy)
    if of_bias:
        dbias = _laid_out(plain.bias_gradient(product.spec, bias, dy), plain.gradient_sharding(bias, dy))
    return dx, dw, dfirst, dsecond, dscale, dbias, None


_low_rank.defvjp(_fwd, _bwd, symbolic_zeros=True)
_traced_once = jax.jit(_low_rank, static_argnums=0)
