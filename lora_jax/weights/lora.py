"""The low-rank kind: W + scale * A·B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax.ops.choice import only_xla
from lora_jax.ops.contract import contract, reorder
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.dropout import drop, rescaling
from lora_jax.ops.low_rank import low_rank_contract, scaled
from lora_jax.sites import Site
from lora_jax.weights.conv import low_rank_conv
from lora_jax.weights.lookup import Picks, picked
from lora_jax.weights.virtual import DotGeneral, Running, Virtual

RANK = "rank"


@dataclass(frozen=True)
class Lora(Running):
    """`W + scale * A·B` with A over (lead, in, rank) and B over (lead, rank, out)."""

    site: Site
    dropout_rate: float = 0.0
    implementation: str | None = None

    @property
    def name(self) -> str:
        return self.site.name

    def materialise(self, w: Virtual) -> jax.Array:
        """The dense weight of this view: summed in float32, rounded once to the base's dtype."""
        return self.summed(w).astype(w.base.dtype)

    def summed(self, w: Virtual) -> jax.Array:
        """The dense weight in float32 (float64 for float64)."""
        (a, a_axes), (b, b_axes) = w.live_factor("a"), w.live_factor("b")
        wide = jnp.promote_types(w.base.dtype, jnp.float32)
        own = tuple(atom for atom in w.visible if not atom.is_repeat)
        delta = contract(a.astype(wide), a_axes, b.astype(wide), b_axes, own, precision=lax.Precision.HIGHEST)
        if own != w.visible:
            once = tuple(1 if atom.is_repeat else w.size(atom) for atom in w.visible)
            delta = jnp.broadcast_to(delta.reshape(once), tuple(map(w.size, w.visible)))
        return w.base.astype(wide) + self.site.scale * _compat.laid_out_as(delta.reshape(w.base.shape), w.base)

    def dot_general(self, w: Virtual, x: jax.Array, dot: DotGeneral, key: Any, eqn: Any) -> jax.Array | None:
        if dot.needs_array or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return None
        spec, first, second = product_of(w, dot, self.dropout_rate)
        y = low_rank_contract(
            spec, shaped(x, dot.split_x), shaped(w.base, dot.split_w), first, second,
            self.site.scale, key, self.implementation, self.name,
        )  # fmt: skip
        return shaped(y, dot.out_shape)

    def conv(self, w: Virtual, x: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        (a, a_axes), (b, b_axes) = w.live_factor("a"), w.live_factor("b")
        only_xla("a convolution", self.implementation, self.name)
        y = _compat.bind(eqn, [x, w.base])[0]
        features = (eqn.params["dimension_numbers"].lhs_spec[1],)
        up = low_rank_conv(
            eqn, drop(x, key, self.dropout_rate, features), w.dims, (a, a_axes), (b, b_axes),
            self.site.scale, 1.0 if key is None else rescaling(self.dropout_rate),
        )  # fmt: skip
        return None if up is None else y + up.astype(y.dtype)

    def ragged_dot(self, w: Virtual, x: jax.Array, sizes: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        (a, a_axes), (b, b_axes) = w.live_factor("a"), w.live_factor("b")
        groups, inner, outer = w.dims
        if {*inner} <= {*b_axes} and {*outer} <= {*a_axes}:  # the other side of the weight is contracted
            a, a_axes, b, b_axes = b, b_axes, a, a_axes
        if {*a_axes} != {*groups, *inner, RANK} or {*b_axes} != {*groups, *outer, RANK}:
            return None
        only_xla("a grouped product", self.implementation, self.name)
        y = _compat.bind(eqn, [x, w.base, sizes])[0]
        n_groups, k, n = w.base.shape
        rank = a.shape[a_axes.index(RANK)]
        a = reorder(a, a_axes, (*groups, *inner, RANK)).reshape(n_groups, k, rank).astype(x.dtype)
        b = reorder(b, b_axes, (*groups, RANK, *outer)).reshape(n_groups, rank, n)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        h = lax.ragged_dot(drop(x, key, self.dropout_rate), a, sizes, preferred_element_type=wide)
        if key is not None:
            h *= jnp.asarray(rescaling(self.dropout_rate), wide)
        h = h.astype(x.dtype)
        return y + lax.ragged_dot(h, scaled(b, self.site.scale, x.dtype), sizes, preferred_element_type=y.dtype)

    def gather(self, w: Virtual, picks: Picks, indices: jax.Array, eqn: Any) -> jax.Array | Virtual:
        """Rows of an embedding table, or whole matrices of a stack chosen by index."""
        only_xla("a lookup", None, self.name)
        view = picked(w, picks, indices, eqn)
        # Of a stack, the chosen matrices are still a low-rank weight; rows of a table are data.
        is_stack = all({"a", "b"} <= {*w.carriers(w.dims[d][0])} for d in picks)
        return view if is_stack else view.kind.materialise(view)

    def times(self, w: Virtual, factor: Callable[[jax.Array], jax.Array]) -> Virtual:
        """The view of `c * W`: linear in both terms, so only the base and one factor change."""
        return w.replace(base=factor(w.base), factors={**w.factors, "b": factor(w.factors["b"])})


def product_of(w: Virtual, dot: DotGeneral, dropout_rate: float) -> tuple[Contraction, jax.Array, jax.Array]:
    """The adapted product of `w` in a `dot_general`, and its factors in the order that they are multiplied in."""
    (a, a_axes), (b, b_axes) = w.live_factor("a"), w.live_factor("b")
    summed = [atom for atom in dot.w if atom in dot.x and atom not in dot.y]
    # The factor that shares summed axes goes first; where both do, the one that shares more.
    by_a, by_b = (sum(atom in axes for atom in summed) for axes in (a_axes, b_axes))
    first, second = ((a, a_axes), (b, b_axes)) if by_a >= by_b else ((b, b_axes), (a, a_axes))
    spec = Contraction(
        x=dot.x, w=dot.w, first=first[1], second=second[1], y=dot.y, summed=dot.summed,
        precision=dot.precision,
        preferred_element_type=dot.preferred_element_type, dropout_rate=dropout_rate,
        out_sharding=dot.out_sharding,
    )  # fmt: skip
    return spec, first[0], second[0]


def shaped(x: Any, shape: tuple[int, ...]) -> Any:
    """`x.reshape(shape)`, which would trace a function even where there is nothing to do."""
    return x if x.shape == shape else x.reshape(shape)


def lora_weight(site: Site, base: Any, a: Any, b: Any, key: Any = None, **settings: Any) -> Virtual:
    """The virtual weight of a whole parameter."""
    lead, inner, outer = site.atoms_of("l"), site.atoms_of("i"), site.atoms_of("o")
    dims = tuple(tuple(atom for atom in site.atoms if atom.axis == d) for d in range(len(site.shape)))
    return Virtual(
        base=base, factors={"a": a, "b": b}, key=key, dims=dims,
        axes=(("a", (*lead, *inner, RANK)), ("b", (*lead, RANK, *outer))),
        sizes=(), dropped=(), kind=Lora(site, **settings),
    )  # fmt: skip
