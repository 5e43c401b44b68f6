"""The weight-decomposed kind: c * (W + scale * A·B), with c = magnitude / norm for each output of each matrix.

Let V = W + scale * A·B. The norm is over the in axes of V, one for each (lead, out) position, and no gradient flows
through it. It is taken of the whole parameter, before any view is cut from it, and never forms A·B:

    |V|² = |W|² + 2·scale·<W, A·B> + scale²·|A·B|²

so c travels with the view as one more factor, and a product is the low-rank one with its outputs multiplied by c.

**Source:** Liu et al., DoRA, arXiv:2402.09353, equations 5 and 11 (section 4.3 for the detached norm); dropout as in
PEFT 0.21, whose base product sees the dropped input wherever it is multiplied by c - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax.ops.contract import reorder, spread
from lora_jax.ops.dropout import dropout
from lora_jax.sites import Site
from lora_jax.weights.lookup import Picks
from lora_jax.weights.lora import Lora, lora_weight, shaped
from lora_jax.weights.norms import magnitude_scale, norms
from lora_jax.weights.virtual import DotGeneral, Running, Virtual

C = "c"


@dataclass(frozen=True)
class Dora(Running):
    """`c * (W + scale * A·B)` with c over (lead, out), in float32."""

    low_rank: Lora

    @property
    def name(self) -> str:
        return self.low_rank.name

    def materialise(self, w: Virtual) -> jax.Array:
        dense = self.low_rank.summed(w)
        c, names = w.live_factor(C)
        repeated = jnp.broadcast_to(spread(c, names, w.visible), [w.size(atom) for atom in w.visible])
        return (dense * _compat.laid_out_as(repeated.reshape(dense.shape), dense)).astype(w.base.dtype)

    def dot_general(self, w: Virtual, x: jax.Array, dot: DotGeneral, key: Any, eqn: Any) -> jax.Array | None:
        c, names = w.live_factor(C)
        sizes = dict(zip((*dot.w, *dot.x), (*dot.split_w, *dot.split_x), strict=True))
        # Where the side that c belongs to is summed over, as in a tied head, it multiplies the input.
        seen, on_output = (dot.y, True) if {*names} <= {*dot.y} else (dot.x, False)
        if not {*names} <= {*seen}:
            return None
        columns = [i for i, name in enumerate(dot.x) if name not in dot.y]
        dropped = None
        if key is not None:
            dropped = dropout(shaped(x, dot.split_x), key, self.low_rank.dropout_rate, columns)
            dropped = shaped(dropped, x.shape)
        c = Scale(spread(c, names, seen), tuple(sizes[name] for name in seen), on_output)
        return c.apply(lambda x, key: self.low_rank.dot_general(w, x, dot, key, eqn), x, key, dropped)

    def conv(self, w: Virtual, x: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        c, names = w.live_factor(C)
        numbers = eqn.params["dimension_numbers"]
        outer = w.dims[numbers.rhs_spec[0]]
        if {*names} != {*outer}:
            return None
        shape = [1] * x.ndim
        shape[numbers.out_spec[1]] = -1
        dropped = None if key is None else dropout(x, key, self.low_rank.dropout_rate, (numbers.lhs_spec[1],))
        c = Scale(reorder(c, names, outer).reshape(shape), eqn.outvars[0].aval.shape, on_output=True)
        return c.apply(lambda x, key: self.low_rank.conv(w, x, key, eqn), x, key, dropped)

    def ragged_dot(self, w: Virtual, x: jax.Array, sizes: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        c, names = w.live_factor(C)
        groups, inner, outer = w.dims
        on_output = {*names} == {*groups, *outer}
        side = outer if on_output else inner
        if {*names} != {*groups, *side}:
            return None
        # Each row's c is its group's: a grouped product with ones, whose sums have one term.
        rows = reorder(c, names, (*groups, *side)).reshape(w.base.shape[0], 1, -1)
        rows = lax.ragged_dot(jnp.ones((x.shape[0], 1), c.dtype), rows, sizes, precision=lax.Precision.HIGHEST)
        dropped = None if key is None else dropout(x, key, self.low_rank.dropout_rate)
        c = Scale(rows, rows.shape, on_output)
        return c.apply(lambda x, key: self.low_rank.ragged_dot(w, x, sizes, key, eqn), x, key, dropped)

    def gather(self, w: Virtual, picks: Picks, indices: jax.Array, eqn: Any) -> jax.Array | Virtual:
        return self.low_rank.gather(w, picks, indices, eqn)

    def times(self, w: Virtual, factor: Callable[[jax.Array], jax.Array]) -> Virtual:
        """c stays that of the parameter, of which the view is a multiple."""
        return self.low_rank.times(w, factor)


@dataclass(frozen=True)
class Scale:
    """c, ready to multiply a product's output or its input, either of them seen in `shape`."""

    c: jax.Array
    shape: tuple[int, ...]
    on_output: bool

    def apply(
        self, product: Callable[[jax.Array, Any], jax.Array | None], x: jax.Array, key: Any, dropped: Any
    ) -> jax.Array | None:
        """`c * product(x)`; with dropout, the low-rank product plus c - 1 times that of the dropped input."""
        if dropped is None:
            return self._around(product, x, self.c)
        y = product(x, key)
        if y is None:
            return None
        more = self._around(product, dropped, self.c - 1)
        assert more is not None
        return y + more

    def _around(self, product: Callable[[jax.Array, Any], jax.Array | None], x: jax.Array, c: Any) -> Any:
        if not self.on_output:
            return product(self._times(x, c), None)
        y = product(x, None)
        return None if y is None else self._times(y, c)

    def _times(self, x: jax.Array, c: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, c.dtype)
        return shaped((shaped(x, self.shape).astype(wide) * c).astype(x.dtype), x.shape)


def dora_weight(site: Site, base: Any, a: Any, b: Any, magnitude: Any, key: Any = None, **settings: Any) -> Virtual:
    """The virtual weight of a whole parameter."""
    w = lora_weight(site, base, a, b, key, **settings)
    assert isinstance(w.kind, Lora)
    c = magnitude_scale(norms(site, base, a, b), magnitude)
    axes = (*w.axes, (C, (*site.atoms_of("l"), *site.atoms_of("o"))))
    return w.replace(factors={**w.factors, C: c}, axes=axes, kind=Dora(w.kind))
