"""The low-rank kind with a bias on B: x·(W + s·A·B) + s·b for each output of each product.

A product with the whole of the weight is one application of the layer, and gets the bias once. Where only a part of the
in axes is summed, or the outputs are, there is no such place, and an error says so.

**Source:** `lora_bias` of PEFT 0.21, made for adapters extracted from a full fine-tune whose biases changed as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.ops.contract import reorder, spread
from lora_jax.sites import Atom, Site
from lora_jax.weights.lookup import Picks
from lora_jax.weights.lora import Lora, lora_weight, shaped
from lora_jax.weights.virtual import DotGeneral, Running, Virtual

BIAS = "bias"


@dataclass(frozen=True)
class BiasedLora(Running):
    """`W + scale * A·B`, and `scale * bias` added to what it is multiplied into; the bias is over (lead, out)."""

    low_rank: Lora

    @property
    def name(self) -> str:
        return self.low_rank.name

    def materialise(self, w: Virtual) -> jax.Array:
        raise ValueError(self._misplaced("is formed in full or looked up here, and a formed weight holds no bias"))

    def dot_general(self, w: Virtual, x: jax.Array, dot: DotGeneral, key: Any, eqn: Any) -> jax.Array | None:
        bias, names = w.live_factor(BIAS)
        self._check(w, names, dot.summed, dot.y)
        y = self.low_rank.dot_general(w, x, dot, key, eqn)
        if y is None:
            return None
        sizes = dict(zip((*dot.w, *dot.x), (*dot.split_w, *dot.split_x), strict=True))
        y = shaped(y, tuple(sizes[name] for name in dot.y))
        return shaped(self._plus(y, spread(bias, names, dot.y)), dot.out_shape)

    def conv(self, w: Virtual, x: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        bias, names = w.live_factor(BIAS)
        numbers = eqn.params["dimension_numbers"]
        outer = w.dims[numbers.rhs_spec[0]]
        inner = tuple(atom for d, dim in enumerate(w.dims) if d != numbers.rhs_spec[0] for atom in dim)
        self._check(w, names, inner, outer)
        y = self.low_rank.conv(w, x, key, eqn)
        if y is None:
            return None
        shape = [1] * y.ndim
        shape[numbers.out_spec[1]] = -1
        return self._plus(y, reorder(bias, names, outer).reshape(shape))

    def ragged_dot(self, w: Virtual, x: jax.Array, sizes: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        bias, names = w.live_factor(BIAS)
        groups, inner, outer = w.dims
        self._check(w, names, inner, (*groups, *outer))
        y = self.low_rank.ragged_dot(w, x, sizes, key, eqn)
        if y is None:
            return None
        rows = reorder(bias, names, (*groups, *outer)).reshape(w.base.shape[0], 1, -1)
        ones = jnp.ones((x.shape[0], 1), bias.dtype)
        return self._plus(y, lax.ragged_dot(ones, rows, sizes, precision=lax.Precision.HIGHEST))

    def gather(self, w: Virtual, picks: Picks, indices: jax.Array, eqn: Any) -> jax.Array | Virtual:
        return self.low_rank.gather(w, picks, indices, eqn)

    def times(self, w: Virtual, factor: Callable[[jax.Array], jax.Array]) -> Virtual:
        """Of `c * W` the bias is multiplied as well, as a row of W would be."""
        out = self.low_rank.times(w, factor)
        return out.replace(factors={**out.factors, BIAS: factor(w.factors[BIAS])})

    def _plus(self, y: jax.Array, bias: jax.Array) -> jax.Array:
        wide = jnp.promote_types(y.dtype, jnp.float32)
        return (y.astype(wide) + self.low_rank.site.scale * bias.astype(wide)).astype(y.dtype)

    def _check(
        self, w: Virtual, names: Sequence[Hashable], summed: Sequence[Hashable], kept: Sequence[Hashable]
    ) -> None:
        """Raises unless the product sums over all in axes of the weight, whole, and keeps those of the bias."""
        inner = [atom for atom in w.axes_of("a") if atom not in w.axes_of("b") and isinstance(atom, Atom)]
        there = math.prod(w.size(atom) for atom in inner if atom in summed)
        if not {*names} <= {*kept} or there != self.low_rank.site.fan_in:
            raise ValueError(self._misplaced("is multiplied in part, or by its outputs, here"))

    def _misplaced(self, what: str) -> str:
        return (
            f"`{self.name}` {what}: `lora_bias` adds to the whole product of a layer. Leave this weight out with "
            "`exclude_modules`, or plan without `lora_bias`."
        )


def biased_weight(site: Site, base: Any, a: Any, b: Any, bias: Any, key: Any = None, **settings: Any) -> Virtual:
    """The virtual weight of a whole parameter."""
    w = lora_weight(site, base, a, b, key, **settings)
    assert isinstance(w.kind, Lora)
    axes = (*w.axes, (BIAS, (*site.atoms_of("l"), *site.atoms_of("o"))))
    return w.replace(factors={**w.factors, BIAS: bias}, axes=axes, kind=BiasedLora(w.kind))
