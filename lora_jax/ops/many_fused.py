"""`y = x·W + (x·A[i])·B[i]` on fused kernels, where every row of a batch has an `i` of its own.

The chosen factors are copied, one pair for each row, which is thin; then kernels compute the whole product of the batch
and its derivative, of operands that may be split over devices (`fused_devices`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax import _compat
from lora_jax.ops import partition, plain
from lora_jax.ops.contract import Axes, contract, ordered, reorder, short
from lora_jax.ops.contraction import Contraction, wide
from lora_jax.ops.families import kernels, many_kernels
from lora_jax.ops.fused import RANK, THIN
from lora_jax.ops.fused_devices import anywhere
from lora_jax.ops.low_rank import SAVED
from lora_jax.ops.matrices import Matrices, axis_sizes
from lora_jax.ops.plain import Wants
from lora_jax.ops.split import Split


@dataclass(frozen=True)
class FusedMany:
    """`spec`: of the whole batch, its first axis `row`. `first`, `second`: axes of the stacks, with `slot` in them.

    The operands of `_forward` and `_backward` have the axes below, lengths of one left out.
    """

    family: str
    spec: Contraction
    first: Axes
    second: Axes
    row: Any
    slot: Any
    matrices: Matrices
    dtype: Any

    @property
    def x(self) -> Axes:
        return (*self.matrices.rows, *self.matrices.inner)

    @property
    def a(self) -> Axes:
        return (self.row, *self.matrices.inner, RANK)

    @property
    def b(self) -> Axes:
        return (self.row, RANK, *self.matrices.outer)

    @property
    def y(self) -> Axes:
        return (*self.matrices.rows, *self.matrices.outer)

    @property
    def h_layout(self) -> tuple[bool, int]:
        return kernels(self.family).h_layout(self.matrices.rank_size)

    @property
    def h(self) -> Axes:
        return (THIN, *self.matrices.rows) if self.h_layout[0] else (*self.matrices.rows, THIN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_product(fused: FusedMany, x: Any, w: Any, first: Any, second: Any, scale: Any, index: Any) -> jax.Array:
    """(row, *x), w and the stacks -> (row, *y); `scale` (slots,), `index` (rows,), negative for the base alone."""
    return _run(fused, x, w, first, second, scale, index)[0]


def _run(fused: FusedMany, x: Any, w: Any, first: Any, second: Any, scale: Any, index: Any) -> Any:
    a, b = _factors(fused, first, second, scale, index)
    y, h = _over_devices(fused)(short(x), short(w), a, b)
    sizes = axis_sizes((fused.spec.x, x.shape), (fused.spec.w, w.shape))
    return y.reshape([sizes[name] for name in fused.spec.y]), h


def _factors(fused: FusedMany, first: Any, second: Any, scale: Any, index: Any) -> tuple[jax.Array, jax.Array]:
    """Each row's (*inner, R) and (R, *outer), the scale in the latter."""
    m, up = fused.matrices, wide(fused.dtype)
    a = ordered(*_taken(fused, first, fused.first, index), (fused.row, *m.inner, *m.rank))
    b = ordered(*_taken(fused, second.astype(up), fused.second, index), (fused.row, *m.rank, *m.outer))
    a = a.reshape(len(index), *m.shape(m.inner), m.rank_size).astype(fused.dtype)
    b = b.reshape(len(index), m.rank_size, *m.shape(m.outer))
    return a, _scaled(b, scale, index).astype(fused.dtype)


def _taken(fused: FusedMany, stack: Any, axes: Axes, index: Any) -> tuple[jax.Array, Axes]:
    """Zero for rows of the base, also where a slot's are not finite."""
    at = axes.index(fused.slot)
    rows = jnp.take(stack, jnp.maximum(index, 0), at, mode="clip")
    on = (index >= 0).reshape([-1 if d == at else 1 for d in range(rows.ndim)])
    return jnp.where(on, rows, 0), tuple(fused.row if name == fused.slot else name for name in axes)


def _scaled(rows: jax.Array, scale: Any, index: Any) -> jax.Array:
    """Each row times the scale of its adapter."""
    own = scale[jnp.maximum(index, 0)].astype(rows.dtype)
    return rows * own.reshape(-1, *(1,) * (rows.ndim - 1))


def _fwd(fused: FusedMany, *operands: Any) -> Any:
    x, w, first, second, scale, index = (operand.value for operand in operands)
    y, h = _run(fused, x, w, first, second, scale, index)
    # Told by a shape, as in `low_rank`.
    wanted = jnp.zeros(tuple(int(operand.perturbed) for operand in operands[:4]))
    return y, (x, w, first, second, scale, index, checkpoint_name(h, SAVED), wanted)


def _bwd(fused: FusedMany, saved: Any, dy: Any) -> Any:
    x, w, first, second, scale, index, h, wanted = saved
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return (None,) * 6
    m = fused.matrices
    of_x, of_w, of_a, of_b = map(bool, wanted.shape)
    dx = dw = da = db = None
    if of_x or of_a or of_b:
        a, b = _factors(fused, first, second, scale, index)
        run = _over_devices(fused, Wants(of_x, of_a, of_b))
        found = iter(run(ordered(dy, fused.spec.y, fused.y), short(x), short(w), a, b, h))
        dx = next(found).reshape(x.shape) if of_x else None
        da = _gathered_back(fused, next(found), (*m.inner, *m.rank), fused.first, first, index) if of_a else None
        if of_b:
            db = _scaled(next(found), scale, index)
            db = _gathered_back(fused, db, (*m.rank, *m.outer), fused.second, second, index)
    if of_w:
        dw = plain.weight_gradient(fused.spec, x, w, dy)
    return dx, dw, da, db, None, None


def _gathered_back(fused: FusedMany, rows: jax.Array, axes: Axes, to: Axes, stack: Any, index: Any) -> jax.Array:
    """Gradients of each row's factors (row, *axes), added up in their slots; those of the base, which may be NaN, in
    none."""
    sizes = axis_sizes((to, stack.shape))
    places = jnp.where(index >= 0, index, sizes[fused.slot])
    slots = jnp.zeros((sizes[fused.slot], *rows.shape[1:]), rows.dtype).at[places].add(rows, mode="drop")
    named = (fused.slot, *axes)
    order = tuple(name for name in to if name in named)
    return (
        reorder(slots.reshape([sizes[name] for name in named]), named, order).reshape(stack.shape).astype(stack.dtype)
    )


fused_product.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _over_devices(fused: FusedMany, wants: Wants | None = None) -> Any:
    """`_forward` of whole operands, or `_backward` for what is wanted of it."""
    m = fused.matrices
    tokens = tuple(name for name in m.rows if name != fused.row)
    w = m.w_axes
    if wants is None:
        local, by_xla = functools.partial(_forward, fused), functools.partial(_plain_forward, fused)
        axes, wishes, summed = [fused.x, w, fused.a, fused.b], (0, 1), m.inner
        out = [(fused.y, m.inner), (fused.h, m.inner)]
    else:
        local, by_xla = (functools.partial(run, fused, wants) for run in (_backward, _plain_backward))
        axes, wishes, summed = [fused.y, fused.x, w, fused.a, fused.b, fused.h], (0, 2), ()
        # What a device has seen only part of.
        every = [(fused.x, m.outer), (fused.a, (*tokens, *m.outer)), (fused.b, tokens)]
        out = [each for each, wanted in zip(every, wants, strict=True) if wanted]

    def added(run: Any) -> Any:
        def call(split: Split, *operands: Any) -> tuple[jax.Array, ...]:
            return tuple(split.add(result, unseen) for result, (_, unseen) in zip(run(*operands), out, strict=True))

        return call

    return partition.split_over_devices(
        added(local), added(by_xla), functools.partial(anywhere, fused.family), axes, [each for each, _ in out],
        size=m.size, rows=m.rows, wishes=wishes, summed=summed,
    )  # fmt: skip


def _as_matrices(fused: FusedMany, x: Any, w: Any, a: Any, b: Any) -> tuple[jax.Array, ...] | None:
    """`x`, `w`, `a` and `b` of this device's part as the kernels want them, or None where it is none for them."""
    rows, inner = x.shape[: len(fused.matrices.rows)], x.shape[len(fused.matrices.rows) :]
    m, k, n, (runs, r) = math.prod(rows), math.prod(inner), math.prod(b.shape[2:]), b.shape[:2]
    if many_kernels(fused.family).unsupported(m, k, n, r, runs, x.dtype):
        return None
    w = w.reshape((n, k) if fused.matrices.transposed else (k, n))
    return x.reshape(m, k), w, a.reshape(runs, k, r), b.reshape(runs, r, n)


def _forward(fused: FusedMany, x: Any, w: Any, a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """Of one device's part; by XLA where that is none for the kernels."""
    part = _as_matrices(fused, x, w, a, b)
    if part is None:
        return _plain_forward(fused, x, w, a, b)
    run, m = many_kernels(fused.family).forward, len(part[0])
    y, h = lax.optimization_barrier(run(*part, transposed=fused.matrices.transposed))
    y, h = _compat.vary_alike(y, h, x, w, a, b)[:2]
    rows = x.shape[: len(fused.matrices.rows)]
    first, thin = fused.h_layout
    h = h[:, :m].reshape(thin, *rows) if first else h[:m].reshape(*rows, thin)
    return y.reshape(*rows, *b.shape[2:]), h


def _backward(fused: FusedMany, wants: Wants, dy: Any, x: Any, w: Any, a: Any, b: Any, h: Any) -> tuple[jax.Array, ...]:
    part = _as_matrices(fused, x, w, a, b)
    if part is None:
        return _plain_backward(fused, wants, dy, x, w, a, b, h)
    module, m = many_kernels(fused.family), len(part[0])
    first, thin = fused.h_layout
    found = module.backward(
        dy.reshape(m, -1), *part, h.reshape((thin, m) if first else (m, thin)),
        transposed=fused.matrices.transposed, wants=module.Wants(*wants),
    )  # fmt: skip
    found = _compat.vary_alike(*found, dy, x, w, a, b)[:3]
    return tuple(got.reshape(like.shape) for got, like, wanted in zip(found, (x, a, b), wants, strict=True) if wanted)


def _plain_forward(fused: FusedMany, x: Any, w: Any, a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """`_forward` by XLA, rounded as the kernels round but for `x·w`."""
    rows = fused.matrices.rows
    up = wide(x.dtype)
    h = contract(x, fused.x, a, fused.a, (*rows, RANK), preferred_element_type=up).astype(x.dtype)
    base = contract(x, fused.x, w, fused.matrices.w_axes, fused.y)
    y = base + contract(h, (*rows, RANK), b, fused.b, fused.y)
    first, thin = fused.h_layout
    h = jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, thin - h.shape[-1])])
    return y, jnp.moveaxis(h, -1, 0) if first else h


def _plain_backward(
    fused: FusedMany, wants: Wants, dy: Any, x: Any, w: Any, a: Any, b: Any, h: Any
) -> tuple[jax.Array, ...]:
    thin_axes = (*fused.matrices.rows, RANK)
    pair = functools.partial(contract, preferred_element_type=wide(x.dtype))
    h = (jnp.moveaxis(h, 0, -1) if fused.h_layout[0] else h)[..., : b.shape[1]]
    g = pair(dy, fused.y, b, fused.b, thin_axes).astype(x.dtype)
    found = []
    if wants.x:
        dx = pair(dy, fused.y, w, fused.matrices.w_axes, fused.x) + pair(g, thin_axes, a, fused.a, fused.x)
        found.append(dx.astype(x.dtype))
    if wants.a:
        found.append(pair(x, fused.x, g, thin_axes, _there(fused, fused.a)).reshape(a.shape))
    if wants.b:
        found.append(pair(h, thin_axes, dy, fused.y, _there(fused, fused.b)).reshape(b.shape))
    return tuple(found)


def _there(fused: FusedMany, axes: Axes) -> Axes:
    """Without the axis of rows where there is only one, which data and results then lack."""
    return tuple(name for name in axes if name != fused.row or name in fused.matrices.rows)
