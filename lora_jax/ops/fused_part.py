"""Products on fused kernels, of one device's part of the operands; by XLA where that part is none for the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax.ops import plain
from lora_jax.ops.dropout import threshold
from lora_jax.ops.families import group_kernels, kernels
from lora_jax.ops.fused import Fused
from lora_jax.ops.plain import Block, Wants
from lora_jax.ops.split import NOT_SPLIT, Split

COLUMNS = 128  # `counter_bits` pairs them within as many

Some = Sequence[Any]  # one for each product


def forward(
    fused: Fused, split: Split, x: Any, ws: Some, a_s: Some, b_s: Some, biases: Some, seed: Any
) -> tuple[list[Any], list[Any]]:
    """Each `y`, and the `h` of all."""
    part = _Part(fused, x, b_s)
    if not part.on_kernels(split):
        return plain_forward(fused, split, x, ws, a_s, b_s, biases, seed)
    drop = _drop(fused, split, x, seed)
    matrices = part.x(x), part.ws(ws), part.a_s(a_s), part.b_s(b_s)
    flat = [None if bias is None else bias.reshape(-1) for bias in biases]
    if fused.together:
        ys, h = _done(group_kernels(fused.family).forward(*matrices, drop, biases=flat))
        hs = [h]
    else:
        run, transposed = kernels(fused.family).forward, fused.one.transposed
        ys, hs = [], []
        for w, a, b, bias in zip(*matrices[1:], flat, strict=True):
            options = {} if bias is None else {"bias": bias}
            y, h = _done(run(matrices[0], w, a, b, drop, transposed=transposed, **options))
            ys.append(y)
            hs.append(h)
    # Inside `shard_map` a kernel's results are typed as the same on all devices.
    found = _compat.vary_alike(*ys, *hs, x, *ws, *a_s, *b_s)
    ys, hs = found[: len(ys)], found[len(ys) : len(ys) + len(hs)]
    return [y.reshape(*part.rows, *b.shape[1:]) for y, b in zip(ys, b_s, strict=True)], part.unfolded(hs)


def backward(
    fused: Fused, split: Split, wants: Wants, dys: Some, x: Any, ws: Some, a_s: Some, b_s: Some, hs: Some, seed: Any
) -> tuple[Any, Any, Any]:
    """Gradients of this part's `x`, each `a` and each `b`: of what it sees."""
    part = _Part(fused, x, b_s)
    if not part.on_kernels(split):
        return plain_backward(fused, split, wants, dys, x, ws, a_s, b_s, hs, seed)
    drop = _drop(fused, split, x, seed)
    outs = [dy.reshape(part.m, -1) for dy in dys]
    flat, matrices = part.x(x), (part.ws(ws), part.a_s(a_s), part.b_s(b_s))
    module = kernels(fused.family)
    if fused.together:
        (h,), wanted = part.folded(hs), module.Wants(*wants)
        dx, das, dbs = group_kernels(fused.family).backward(outs, flat, *matrices, h, drop, wants=wanted)
    else:
        options = {"transposed": fused.one.transposed, "wants": module.Wants(*wants)}
        each = [
            module.backward(dy, flat, w, a, b, h, drop, **options)
            for dy, w, a, b, h in zip(outs, *matrices, part.folded(hs), strict=True)
        ]
        dx, das, dbs = (found if wanted else None for found, wanted in zip(zip(*each, strict=True), wants, strict=True))
        dx = None if dx is None else plain.total(dx, x.dtype)
    dx, *found = _compat.vary_alike(dx, *(das or ()), *(dbs or ()), *dys, x, *ws, *a_s, *b_s)
    dx = None if dx is None else dx.reshape(x.shape)
    found = iter(found)
    das, dbs = (
        [next(found).reshape(factor.shape) for factor in factors] if wanted else None
        for factors, wanted in ((a_s, wants.a), (b_s, wants.b))
    )
    return dx, das, dbs


def _done(results: Any) -> Any:
    """`(y, h)` or `(ys, h)`, computed once.

    In a scan XLA would let the kernel write what is kept of `y` where it is kept, and run it a second time for whoever
    else reads `y`.
    """
    return lax.optimization_barrier(results)


def _drop(fused: Fused, split: Split, x: Any, seed: Any) -> Any:
    if seed is None:
        return None
    block, rows = _block(fused, split, x), len(fused.one.rows)
    firsts = (
        jnp.asarray(origin[0] * math.prod(whole[1:]) if whole else 0, jnp.int32)
        for whole, origin in (
            (block.whole[:rows], block.origin[:rows]),
            (block.whole[rows:], block.origin[rows:]),
        )
    )
    return kernels(fused.family).Drop(jnp.stack([seed[0], seed[1], *firsts]), threshold(fused.dropout_rate))


def plain_forward(
    fused: Fused, split: Split, x: Any, ws: Some, a_s: Some, b_s: Some, biases: Some, seed: Any
) -> tuple[list[Any], list[Any]]:
    """`forward` by XLA, with each `h` as the kernels lay it out."""
    ys, hs = plain.forward(fused.spec, x, ws, a_s, b_s, seed, _block(fused, split, x), biases=biases)
    packed, left = [], iter(hs)
    for rank_first, thins in fused.layouts:
        padded = [
            jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, n - h.shape[-1])]) for n, h in zip(thins, left, strict=False)
        ]
        h = padded[0] if len(padded) == 1 else jnp.concatenate(padded, -1)
        packed.append(jnp.moveaxis(h, -1, 0) if rank_first else h)
    return ys, packed


def plain_backward(
    fused: Fused, split: Split, wants: Wants, dys: Some, x: Any, ws: Some, a_s: Some, b_s: Some, hs: Some, seed: Any
) -> tuple[Any, Any, Any]:
    """`backward` by XLA."""
    parts = []
    for (rank_first, thins), h in zip(fused.layouts, hs, strict=True):
        h = jnp.moveaxis(h, 0, -1) if rank_first else h
        parts += [h] if len(thins) == 1 else lax.split(h, thins, h.ndim - 1)
    parts = [h[..., : b.shape[0]] for h, b in zip(parts, b_s, strict=True)]
    return plain.backward(fused.spec, dys, x, ws, a_s, b_s, parts, seed, wants, _block(fused, split, x))


def _block(fused: Fused, split: Split, x: Any) -> Block:
    origin = split.origin(fused.x, x.shape) if split is not NOT_SPLIT else (0,) * x.ndim
    return Block(split.whole(fused.x, x.shape), origin)


class _Part:
    """One device's part of the operands, as the matrices that kernels take."""

    def __init__(self, fused: Fused, x: Any, b_s: Some):
        count = len(fused.one.rows)
        self.fused, self.rows = fused, x.shape[:count]
        self.m, self.k = math.prod(self.rows), math.prod(x.shape[count:])
        self.widths = [(math.prod(b.shape[1:]), b.shape[0]) for b in b_s]

    def on_kernels(self, split: Split) -> bool:
        """Not where the part is none for them.

        For its mask they know a part's place as a first row and a first column, the latter a multiple of 128: parts of
        rows that don't lie together have neither.
        """
        fused, one, dtype = self.fused, self.fused.one, self.fused.dtype
        inside = (*one.rows[1:], *one.inner[1:])
        ragged = self.k % COLUMNS and any(name in split.over for name in one.inner)
        if fused.dropout_rate and (ragged or any(name in split.over for name in inside)):
            return False
        if fused.together:
            ns, ranks = zip(*self.widths, strict=True)
            if group_kernels(fused.family).unsupported(self.m, self.k, ns, ranks, dtype):
                return False
        module = kernels(fused.family)
        return not any(module.unsupported(self.m, self.k, n, r, dtype) for n, r in self.widths)

    def x(self, x: Any) -> Any:
        return x.reshape(self.m, self.k)

    def ws(self, ws: Some) -> list[Any]:
        shapes = [(n, self.k) if self.fused.one.transposed else (self.k, n) for n, _ in self.widths]
        return [w.reshape(shape) for w, shape in zip(ws, shapes, strict=True)]

    def a_s(self, a_s: Some) -> list[Any]:
        return [a.reshape(self.k, r) for a, (_, r) in zip(a_s, self.widths, strict=True)]

    def b_s(self, b_s: Some) -> list[Any]:
        return [b.reshape(r, n) for b, (n, r) in zip(b_s, self.widths, strict=True)]

    def folded(self, hs: Some) -> list[Any]:
        layouts = self.fused.layouts
        return [
            h.reshape((sum(thins), self.m) if rank_first else (self.m, sum(thins)))
            for (rank_first, thins), h in zip(layouts, hs, strict=True)
        ]

    def unfolded(self, hs: Some) -> list[Any]:
        """With their rows in several axes again, and none beyond M."""
        return [
            h[:, : self.m].reshape(sum(thins), *self.rows)
            if rank_first
            else h[: self.m].reshape(*self.rows, sum(thins))
            for (rank_first, thins), h in zip(self.fused.layouts, hs, strict=True)
        ]
