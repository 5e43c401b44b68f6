"""`y = x·W + s·(drop(x)·A)·B (+ bias)` over named axes, with its own derivative.

Every adapted matrix product of a model ends here, whatever its axes: plain, batched, with heads, with the weight
first, or against a transposed weight. Names replace positions. One `custom_vjp` serves every implementation: XLA's
contractions (`plain`) and the fused kernels (`fused`) take the same operands and keep the same residuals. It is one of
several products with one `x`; a lone product is a group of one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lora_jax import _compat
from lora_jax.ops import fused_devices, plain
from lora_jax.ops.choice import Choice, Sharing, choose, choose_group
from lora_jax.ops.contract import Axes, ordered, reorder, short
from lora_jax.ops.contraction import Contraction, compute_dtype, wide
from lora_jax.ops.dropout import seed_words
from lora_jax.ops.fused import Fused
from lora_jax.ops.matrices import axis_sizes
from lora_jax.ops.plain import Wants

# What `jax.checkpoint_policies` know `x·first` by, which is thin and takes a pass over `x` to compute.
SAVED = "lora_h"


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
    sizes = _sizes(spec, x, w, first, second)
    dropped = key is not None and spec.dropout_rate > 0
    choices = [choose(spec, sizes, x, w, implementation, dropped=dropped, name=name)]
    return _run(spec, choices, Sharing.IN_TURN, x, [w], [first], [second], [scale], [bias], key)[0]


def low_rank_group(
    spec: Contraction,
    x: jax.Array,
    ws: Sequence[jax.Array],
    firsts: Sequence[jax.Array],
    seconds: Sequence[jax.Array],
    scales: Sequence[float | jax.Array],
    biases: Sequence[jax.Array | None],
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> list[jax.Array]:
    """`low_rank_contract` for several weights and one `x`, all of them with the axes that `spec` says.

    The lengths of the rank and of the axes that a weight keeps may differ. `x` is read once for `x·first` of all, and
    once for the gradients of all `first`; its own gradient is the sum over all in float32, rounded once (by XLA after
    its products are). One mask serves all.

    **Raises:** as `low_rank_contract`.
    """
    sizes = [_sizes(spec, x, *each) for each in zip(ws, firsts, seconds, strict=True)]
    dropped = key is not None and spec.dropout_rate > 0
    how, choices = choose_group(spec, sizes, x, ws, implementation, dropped=dropped)
    if how is not Sharing.APART:
        return _run(spec, choices, how, x, ws, firsts, seconds, scales, biases, key)
    return [
        _run(spec, [choice], how, x, [w], [first], [second], [scale], [bias], key)[0]
        for choice, w, first, second, scale, bias in zip(choices, ws, firsts, seconds, scales, biases, strict=True)
    ]


def _run(
    spec: Contraction,
    choices: Sequence[Choice],
    how: Sharing,
    x: jax.Array,
    ws: Sequence[jax.Array],
    firsts: Sequence[jax.Array],
    seconds: Sequence[jax.Array],
    scales: Sequence[float | jax.Array],
    biases: Sequence[jax.Array | None],
    key: jax.Array | None,
) -> list[jax.Array]:
    seed = None if key is None or spec.dropout_rate == 0 else seed_words(key)
    # Inside `shard_map` a custom derivative must give gradients that vary exactly as its arguments do.
    # A number stays one of numpy's: as an array of jax it would be an operation of its own at every site.
    factors = [scale if isinstance(scale, jax.Array) else np.asarray(scale) for scale in scales]
    leaves, tree = jax.tree.flatten(
        (x, list(ws), list(firsts), list(seconds), [f.astype(wide(x.dtype)) for f in factors], list(biases))
    )
    operands = tree.unflatten(_compat.vary_alike(*leaves))
    spec = replace(spec, x_sharding=_compat.explicit_sharding(x))
    fused = None
    if choices[0].implementation != "xla":
        matrices = tuple(choice.matrices for choice in choices if choice.matrices is not None)
        rate = 0.0 if seed is None else spec.dropout_rate
        fused = Fused(choices[0].implementation, matrices, rate, x.dtype, together=how is Sharing.TOGETHER)
    # Jitted, so that layers of one shape are traced, differentiated and lowered once between them.
    with reverse_mode_only():
        return _traced_once(_Product(spec, fused), *operands, seed)


@contextlib.contextmanager
def reverse_mode_only() -> Iterator[None]:
    """**Raises:** `TypeError` that says what to do in the place of JAX's about a `custom_vjp`."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "the low-rank product has a reverse-mode derivative only, and this is forward mode (`jax.jvp`, "
            "`jax.jacfwd`): use `jax.grad`, `jax.vjp` or `jax.jacrev`, or differentiate the model at "
            "`lora_jax.merge(params, adapter)`, which is the same function."
        ) from error


def _sizes(spec: Contraction, x: Any, w: Any, first: Any, second: Any) -> dict[Hashable, int]:
    return axis_sizes((spec.x, x.shape), (spec.w, w.shape), (spec.first, first.shape), (spec.second, second.shape))


def scaled(second: jax.Array, scale: float | jax.Array, dtype: Any) -> jax.Array:
    """`scale * second`, multiplied in float32 (float64 for float64) and rounded once to `dtype`."""
    up = wide(dtype)
    return (second.astype(up) * jnp.asarray(scale, up)).astype(dtype)


@dataclass(frozen=True)
class _Product:
    """Contractions of one `x`, alike but for their lengths, and what computes them."""

    spec: Contraction
    fused: Fused | None

    def forward(self, x: Any, ws: Any, firsts: Any, ups: Any, biases: Any, seed: Any) -> tuple[list[Any], list[Any]]:
        """`(ys, hs)`: the results and what the way back needs."""
        spec, fused = self.spec, self.fused
        if fused is None:
            return plain.forward(spec, x, ws, firsts, ups, seed, biases=biases)
        m = fused.one
        flat = [
            None if b is None else ordered(b if b.dtype == x.dtype else b.astype(wide(x.dtype)), spec.bias, m.outer)
            for b in biases
        ]
        ys, hs = fused_devices.forward(fused, short(x), [short(w) for w in ws], *self._factors(firsts, ups), flat, seed)
        if m.flipped:
            ys = [reorder(y, fused.y, (*m.outer, *m.rows)) for y in ys]
        shapes = [_shape(spec.y, (spec.x, x), (spec.w, w)) for w in ws]
        return [y.reshape(shape) for y, shape in zip(ys, shapes, strict=True)], hs

    def backward(
        self, dys: Any, x: Any, ws: Any, firsts: Any, ups: Any, hs: Any, seed: Any, wants: Wants
    ) -> tuple[Any, Any, Any]:
        """Gradients of `x`, of each `first` and each `up`, the last two in the wide dtype."""
        spec, fused = self.spec, self.fused
        if fused is None:
            return plain.backward(spec, dys, x, ws, firsts, ups, hs, seed, wants)
        a_s, b_s = self._factors(firsts, ups)
        outs = [ordered(dy, spec.y, fused.y) for dy in dys]
        dx, das, dbs = fused_devices.backward(fused, outs, short(x), [short(w) for w in ws], a_s, b_s, hs, seed, wants)
        m = fused.one
        if dx is not None:
            dx = _laid_out(dx.reshape(x.shape), spec.x_sharding)
        if das is not None:
            das = self._unfold(das, (*m.inner, *m.rank), spec.first, firsts, dys[0])
        if dbs is not None:
            dbs = self._unfold(dbs, (*m.rank, *m.outer), spec.second, ups, dys[0])
        return dx, das, dbs

    def _factors(self, firsts: Any, ups: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """Each (*inner, R) and each (R, *outer), thin copies."""
        spec, fused = self.spec, self.fused
        assert fused is not None
        a_s, b_s = [], []
        for first, up, m in zip(firsts, ups, fused.matrices, strict=True):
            a, b = ordered(first, spec.first, (*m.inner, *m.rank)), ordered(up, spec.second, (*m.rank, *m.outer))
            a_s.append(a.reshape(*m.shape(m.inner), m.rank_size).astype(fused.dtype))
            b_s.append(b.reshape(m.rank_size, *m.shape(m.outer)))
        return a_s, b_s

    def _unfold(self, gradients: Any, axes: Axes, to: Axes, factors: Any, dy: Any) -> list[jax.Array]:
        """From (*inner, R) or (R, *outer) to each factor's own axes."""
        order, found = tuple(name for name in to if name in axes), []
        for gradient, like in zip(gradients, factors, strict=True):
            sizes = axis_sizes((to, like.shape))
            gradient = reorder(gradient.reshape([sizes[name] for name in axes]), axes, order).reshape(like.shape)
            found.append(_laid_out(gradient, plain.gradient_sharding(like, dy)))
        return found


def _laid_out(x: jax.Array, sharding: Any) -> jax.Array:
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _shape(axes: Axes, *operands: tuple[Axes, Any]) -> tuple[int, ...]:
    sizes = axis_sizes(*((names, x.shape) for names, x in operands))
    return tuple(sizes[name] for name in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank(product, x, ws, firsts, seconds, scales, biases, seed):
    return product.forward(x, ws, firsts, _ups(seconds, scales, x), biases, seed)[0]


def _ups(seconds, scales, x):
    return [scaled(second, scale, compute_dtype(x)) for second, scale in zip(seconds, scales, strict=True)]


def _fwd(product, *operands):
    x, ws, firsts, seconds, scales, biases, seed = jax.tree.map(lambda operand: operand.value, operands)
    ys, hs = product.forward(x, ws, firsts, _ups(seconds, scales, x), biases, seed)
    hs = [checkpoint_name(h, SAVED) for h in hs]
    # Which gradients are wanted, and x's dtype, told by a shape and not by structure or by leaving residuals out: JAX
    # keeps one structure for an equation, that of the last time it was differentiated, by whichever arguments.
    of_x, of_ws, of_firsts, of_seconds, of_scales, of_biases, _ = jax.tree.map(
        lambda operand: operand.perturbed, operands
    )
    wanted = (of_x, any(of_firsts), any(of_seconds) or any(of_scales), *of_ws, *(bool(of) for of in of_biases))
    flags = jnp.zeros(tuple(map(int, wanted)), x.dtype)
    return ys, (x, ws, firsts, seconds, scales, biases, seed, hs, flags)


def _bwd(product, saved, dys):
    x, ws, firsts, seconds, scales, biases, seed, hs, flags = saved
    zero = jax.custom_derivatives.SymbolicZero
    if all(isinstance(dy, zero) for dy in dys):
        return None, None, None, None, None, None, None
    dys = [_compat.zeros_of(dy.aval) if isinstance(dy, zero) else dy for dy in dys]
    of_x, of_a, of_b, *of_each = map(bool, flags.shape)
    of_ws, of_biases = of_each[: len(ws)], of_each[len(ws) :]
    wants = Wants(of_x, of_a, of_b)
    nothing = [None] * len(ws)
    dx, dfirsts, dseconds, dscales = None, nothing, nothing, nothing
    if any(wants):
        dx, das, dups = product.backward(dys, x, ws, firsts, _ups(seconds, scales, x), hs, seed, wants)
        if das is not None:
            dfirsts = [da.astype(first.dtype) for da, first in zip(das, firsts, strict=True)]
        if dups is not None:
            each = list(zip(dups, seconds, scales, strict=True))
            dseconds = [(dup * scale.astype(dup.dtype)).astype(second.dtype) for dup, second, scale in each]
            dscales = [(dup * second.astype(dup.dtype)).sum().astype(scale.dtype) for dup, second, scale in each]
    dws = [
        plain.weight_gradient(product.spec, x, w, dy) if of_w else None
        for w, dy, of_w in zip(ws, dys, of_ws, strict=True)
    ]
    dbiases = [
        _laid_out(plain.bias_gradient(product.spec, bias, dy), plain.gradient_sharding(bias, dy)) if of_bias else None
        for bias, dy, of_bias in zip(biases, dys, of_biases, strict=True)
    ]
    return dx, dws, dfirsts, dseconds, dscales, dbiases, None


_low_rank.defvjp(_fwd, _bwd, symbolic_zeros=True)
_traced_once = jax.jit(_low_rank, static_argnums=0)
