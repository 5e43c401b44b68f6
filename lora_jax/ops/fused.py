"""A product on fused kernels: the operands seen as matrices, one device's part of them, and where kernels can't be.

Three layers, outermost first: under `vmap`, and on any other platform that the program may be lowered for, XLA; where
operands may be split over devices, the part of each device; on one device, the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from lora_jax import _compat
from lora_jax.ops import partition, plain
from lora_jax.ops.contract import Axes
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.dropout import threshold
from lora_jax.ops.families import FAMILIES, kernels
from lora_jax.ops.matrices import Matrices
from lora_jax.ops.plain import Block, Wants
from lora_jax.ops.split import NOT_SPLIT, Split

RANK, THIN = "rank", "thin"  # `THIN`: the rank as the kernels pad it
COLUMNS = 128  # `counter_bits` pairs them within as many


@dataclass(frozen=True)
class Fused:
    """One product on one family of kernels. Operands have the axes of `matrices`, lengths of one left out."""

    family: str
    matrices: Matrices
    dropout_rate: float
    dtype: Any

    @property
    def spec(self) -> Contraction:
        m = self.matrices
        return Contraction(
            x=self.x, w=self.w, first=self.a, second=self.b, y=self.y, bias=m.outer, summed=m.inner,
            dropout_rate=self.dropout_rate,
        )  # fmt: skip

    @property
    def x(self) -> Axes:
        return (*self.matrices.rows, *self.matrices.inner)

    @property
    def w(self) -> Axes:
        return self.matrices.w_axes

    @property
    def a(self) -> Axes:
        return (*self.matrices.inner, RANK)

    @property
    def b(self) -> Axes:
        return (RANK, *self.matrices.outer)

    @property
    def y(self) -> Axes:
        return (*self.matrices.rows, *self.matrices.outer)

    @property
    def h(self) -> Axes:
        rows = self.matrices.rows
        return (THIN, *rows) if self._layout[0] else (*rows, THIN)

    @property
    def _layout(self) -> tuple[bool, int]:
        return kernels(self.family).h_layout(self.matrices.rank_size)

    def forward(self, x: Any, w: Any, a: Any, b: Any, bias: Any, seed: Any) -> tuple[jax.Array, jax.Array]:
        """`(y, h)` of whole operands, which may be split over devices."""
        inner = self.matrices.inner
        axes = (self.x, self.w, self.a, self.b, self.matrices.outer, ("seed",))
        operands, axes, every = _given((x, w, a, b, bias, seed), axes)

        def local(split: Split, *parts: Any) -> tuple[jax.Array, ...]:
            return added(split, self._forward, *every(parts))

        def by_xla(split: Split, *parts: Any) -> tuple[jax.Array, ...]:
            return added(split, self._plain_forward, *every(parts))

        def added(split: Split, run: Any, x: Any, w: Any, a: Any, b: Any, bias: Any, seed: Any) -> Any:
            # Where the results of several devices are added, one of them adds the bias.
            bias = None if bias is None else split.once(bias, inner)
            return tuple(split.add(out, inner) for out in run(split, x, w, a, b, bias, seed))

        run = partition.split_over_devices(
            local, by_xla, self._anywhere, self.matrices, axes, (self.y, self.h), wishes=(0, 1, 0), summed=inner
        )
        y, h = run(*operands)
        return y, h

    def backward(
        self, dy: Any, x: Any, w: Any, a: Any, b: Any, h: Any, seed: Any, wants: Wants
    ) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
        """Gradients of whole operands: of `x` in its dtype, of `a` and `b` in float32."""
        axes = (self.y, self.x, self.w, self.a, self.b, self.h, ("seed",))
        operands, axes, every = _given((dy, x, w, a, b, h, seed), axes)
        m = self.matrices
        unseen = (m.outer, (*m.rows, *m.outer), m.rows)
        out = [group for group, wanted in zip((self.x, self.a, self.b), wants, strict=True) if wanted]

        def added(split: Split, gradients: Any) -> tuple[jax.Array, ...]:
            return tuple(split.add(g, axes) for g, axes in zip(gradients, unseen, strict=True) if g is not None)

        def local(split: Split, *parts: Any) -> tuple[jax.Array, ...]:
            return added(split, self._backward(split, wants, *every(parts)))

        def by_xla(split: Split, *parts: Any) -> tuple[jax.Array, ...]:
            return added(split, self._plain_backward(split, wants, *every(parts)))

        run = partition.split_over_devices(
            local, by_xla, self._anywhere, m, axes, tuple(out), wishes=(0, 2, 0, 1), summed=()
        )
        gradients = iter(run(*operands))
        dx, da, db = (next(gradients) if wanted else None for wanted in wants)
        return dx, da, db

    def _anywhere(self, run: Any, by_xla: Any) -> Any:
        """`run` on the kernels' platforms and `by_xla` on others; `by_xla` under `vmap`."""
        platforms = FAMILIES[self.family].platforms

        @custom_vmap
        def call(*operands: Any) -> Any:
            return lax.platform_dependent(*operands, **{name: run for name in platforms}, default=by_xla)

        @call.def_vmap
        def _(size: int, mapped: Any, *operands: Any) -> Any:
            out = jax.vmap(by_xla, in_axes=tuple(0 if one else None for one in mapped), axis_size=size)(*operands)
            return out, jax.tree.map(lambda _: True, out)

        return call

    # One device's part ----------------------------------------------------------------------------------------------

    def _forward(self, split: Split, x: Any, w: Any, a: Any, b: Any, bias: Any, seed: Any) -> tuple[Any, Any]:
        module, sizes = self._module_for(split, x, b)
        if module is None:
            return self._plain_forward(split, x, w, a, b, bias, seed)
        m, k, n, r = sizes
        y, h = module.forward(
            x.reshape(m, k), w.reshape((n, k) if self.matrices.transposed else (k, n)), a.reshape(k, r),
            b.reshape(r, n), self._drop(module, split, x, seed), transposed=self.matrices.transposed,
            **({} if bias is None else {"bias": bias.reshape(n)}),
        )  # fmt: skip
        # In a scan XLA would let the kernel write what is kept of `y` where it is kept, and run it a second time for
        # whoever else reads `y`.
        y, h = lax.optimization_barrier((y, h))
        # Inside `shard_map` a kernel's results are typed as the same on all devices.
        y, h, *_ = _compat.vary_alike(y, h, x, w, a, b)
        rows = x.shape[: len(self.matrices.rows)]
        rank_first, thin = self._layout
        h = h[:, :m].reshape(thin, *rows) if rank_first else h[:m].reshape(*rows, thin)
        return y.reshape(*rows, *b.shape[1:]), h

    def _backward(
        self, split: Split, wants: Wants, dy: Any, x: Any, w: Any, a: Any, b: Any, h: Any, seed: Any
    ) -> tuple[Any, Any, Any]:
        module, sizes = self._module_for(split, x, b)
        if module is None:
            return self._plain_backward(split, wants, dy, x, w, a, b, h, seed)
        m, k, n, r = sizes
        rank_first, thin = self._layout
        dx, da, db = module.backward(
            dy.reshape(m, n), x.reshape(m, k), w.reshape((n, k) if self.matrices.transposed else (k, n)),
            a.reshape(k, r), b.reshape(r, n), h.reshape((thin, m) if rank_first else (m, thin)),
            self._drop(module, split, x, seed), transposed=self.matrices.transposed, wants=module.Wants(*wants),
        )  # fmt: skip
        dx, da, db, *_ = _compat.vary_alike(dx, da, db, dy, x, w, a, b)
        shapes = (x.shape, a.shape, b.shape)
        dx, da, db = (None if g is None else g.reshape(s) for g, s in zip((dx, da, db), shapes, strict=True))
        return dx, da, db

    def _module_for(self, split: Split, x: Any, b: Any) -> tuple[Any, tuple[int, int, int, int]]:
        """The kernels and the sizes of this part; no kernels where the part is none for them.

        For its mask they know a part's place as a first row and a first column, the latter a multiple of 128: parts of
        rows that don't lie together have neither.
        """
        rows = len(self.matrices.rows)
        sizes = math.prod(x.shape[:rows]), math.prod(x.shape[rows:]), math.prod(b.shape[1:]), b.shape[0]
        module = kernels(self.family)
        inside = (*self.matrices.rows[1:], *self.matrices.inner[1:])
        ragged = sizes[1] % COLUMNS and any(name in split.over for name in self.matrices.inner)
        if self.dropout_rate and (ragged or any(name in split.over for name in inside)):
            return None, sizes
        return (None if module.unsupported(*sizes, self.dtype) else module), sizes

    def _drop(self, module: Any, split: Split, x: Any, seed: Any) -> Any:
        if seed is None:
            return None
        block, rows = _block(split, self.x, x), len(self.matrices.rows)
        firsts = (
            jnp.asarray(origin[0] * math.prod(whole[1:]) if whole else 0, jnp.int32)
            for whole, origin in (
                (block.whole[:rows], block.origin[:rows]),
                (block.whole[rows:], block.origin[rows:]),
            )
        )
        return module.Drop(jnp.stack([seed[0], seed[1], *firsts]), threshold(self.dropout_rate))

    def _plain_forward(self, split: Split, x: Any, w: Any, a: Any, b: Any, bias: Any, seed: Any) -> tuple[Any, Any]:
        y, h = plain.forward(self.spec, x, w, a, b, seed, _block(split, self.x, x), bias)
        rank_first, thin = self._layout
        h = jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, thin - h.shape[-1])])
        return y, jnp.moveaxis(h, -1, 0) if rank_first else h

    def _plain_backward(
        self, split: Split, wants: Wants, dy: Any, x: Any, w: Any, a: Any, b: Any, h: Any, seed: Any
    ) -> tuple[Any, Any, Any]:
        h = jnp.moveaxis(h, 0, -1) if self._layout[0] else h
        return plain.backward(self.spec, dy, x, w, a, b, h[..., : b.shape[0]], seed, wants, _block(split, self.x, x))


def _given(operands: tuple[Any, ...], axes: tuple[Axes, ...]) -> tuple[list[Any], list[Axes], Any]:
    """The operands that are there, their axes, and a function from these (or others in their place) to all of them."""
    there = [i for i, operand in enumerate(operands) if operand is not None]

    def every(given: Sequence[Any]) -> list[Any]:
        place = dict(zip(there, given, strict=True))
        return [place.get(i) for i in range(len(operands))]

    return [operands[i] for i in there], [axes[i] for i in there], every


def _block(split: Split, axes: Axes, x: Any) -> Block:
    return Block(split.whole(axes, x.shape), split.origin(axes, x.shape) if split is not NOT_SPLIT else (0,) * x.ndim)
