"""The kind of one adapter chosen out of a stack of them: W + scale[i] * A[i]·B[i], with `i` a value of the program.

The factors of all slots stay one array each, with the slots before the rank: A (*lead, *in, slot, rank), B (*lead,
slot, rank, *out), so that all of them together are the factors of one adapter of slots times the rank. Products choose
as late as they can (`ops.many`), so that under `vmap` over `i` no adapter is copied where that can be spared. A
negative `i` is the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import _compat
from lora_jax.ops.choice import only_xla
from lora_jax.ops.choice_many import refuse_fused
from lora_jax.ops.contract import contract
from lora_jax.ops.many import SLOT, Many, many_contract, part_by_part
from lora_jax.sites import Site
from lora_jax.weights.lookup import Picks, batch_atoms, rest_of_gather, take_from_factor
from lora_jax.weights.lora import RANK, Lora, product_of
from lora_jax.weights.virtual import DotGeneral, Running, Virtual


@dataclass(frozen=True)
class Chosen(Running):
    """One of a stack of low-rank adapters. `selection`: see `ops.many`."""

    site: Site
    dropout_rate: float = 0.0
    selection: str | None = None

    @property
    def name(self) -> str:
        return self.site.name

    def alone(self, w: Virtual) -> Virtual:
        """The same weight as that of one adapter, whose factors are copied out of the stacks."""
        scale = _scale(w)
        factors, axes = {}, {}
        for name in ("a", "b"):
            factors[name], axes[name] = self._taken(w, name)
        wide = jnp.promote_types(factors["b"].dtype, jnp.float32)
        factors["b"] = factors["b"].astype(wide) * scale.astype(wide)
        site = replace(self.site, alpha=float(self.site.rank), rslora=False)
        return w.replace(factors=factors, axes=tuple(axes.items()), kind=Lora(site, self.dropout_rate, "xla"))

    def _taken(self, w: Virtual, name: str) -> tuple[jax.Array, tuple[Any, ...]]:
        axes = w.axes_of(name)
        index = jnp.maximum(w.factors["index"], 0)
        chosen = jax.lax.dynamic_index_in_dim(w.factors[name], index, axes.index(SLOT), keepdims=False)
        chosen = jnp.where(w.factors["index"] < 0, 0, chosen)  # and not by a scale of 0, which leaves NaN
        return chosen, tuple(axis for axis in axes if axis != SLOT)

    def materialise(self, w: Virtual) -> jax.Array:
        one = self.alone(w)
        return one.kind.materialise(one)

    def dot_general(self, w: Virtual, x: jax.Array, dot: DotGeneral, key: Any, eqn: Any) -> jax.Array | None:
        if dot.needs_array or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return None
        spec, first, second = product_of(w, dot, self.dropout_rate)
        stacks = Many(spec.first, spec.second, w.factors["scale"].shape[0], self.selection)
        plain = replace(spec, first=_without_slot(spec.first), second=_without_slot(spec.second))
        y = many_contract(
            plain, stacks, x.reshape(dot.split_x), w.base.reshape(dot.split_w), first, second,
            w.factors["scale"], w.factors["index"], key, self.name,
        )  # fmt: skip
        return y.reshape(dot.out_shape)

    def conv(self, w: Virtual, x: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        refuse_fused("a convolution", self.selection, self.name)
        one = self.alone(w)
        return one.kind.conv(one, x, key, eqn)

    def ragged_dot(self, w: Virtual, x: jax.Array, sizes: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        """Part by part: JAX maps no `ragged_dot` over data alone."""
        refuse_fused("a grouped product", self.selection, self.name)
        one = self.alone(w)
        keys = () if key is None else (key,)

        def part(x: jax.Array, base: jax.Array, factors: Any, sizes: jax.Array, *keys: Any) -> jax.Array:
            w = one.replace(base=base, factors=factors)
            y = one.kind.ragged_dot(w, x, sizes, keys[0] if keys else None, eqn)
            return _compat.bind(eqn, [x, w.kind.materialise(w), sizes])[0] if y is None else y

        return part_by_part(part)(x, w.base, one.factors, sizes, *keys)

    def gather(self, w: Virtual, picks: Picks, indices: jax.Array, eqn: Any) -> jax.Array | Virtual:
        """Rows of a table come out of the chosen slot by one gather; chosen matrices of a stack are of one adapter."""
        column = {w.dims[d][0]: c for d, c in picks.items()}
        if all(len(w.carriers(atom)) == 2 for atom in column):
            one = self.alone(w)
            return one.kind.gather(one, picks, indices, eqn)
        only_xla("a lookup", None, self.name)
        base = _compat.bind(eqn, [w.base, indices])[0]
        batch = batch_atoms(min(column), eqn)
        rest = rest_of_gather(w, picks, eqn, batch)
        index = jnp.maximum(w.factors["index"], 0)
        parts: list[tuple[jax.Array, tuple[Any, ...]]] = []
        for name in ("a", "b"):
            array, names = w.live_factor(name)
            mine = {names.index(atom): c for atom, c in column.items() if atom in names}
            if mine:
                array = take_from_factor(array, mine, indices, eqn, {names.index(SLOT): index})
                names = (*batch, *(n for n in names if n not in column and n != SLOT))
            else:
                array = jax.lax.dynamic_index_in_dim(array, index, names.index(SLOT), keepdims=False)
                names = _without_slot(names)
            parts.append((array, names))
        wide = jnp.promote_types(base.dtype, jnp.float32)
        (a, a_axes), (b, b_axes) = parts
        shown = tuple(atom for dim in rest for atom in dim)
        delta = contract(a.astype(wide), a_axes, b.astype(wide), b_axes, shown).reshape(base.shape)
        return base + jnp.where(w.factors["index"] < 0, 0, _scale(w).astype(wide) * delta).astype(base.dtype)

    def times(self, w: Virtual, factor: Callable[[jax.Array], jax.Array]) -> Virtual:
        return w.replace(base=factor(w.base), factors={**w.factors, "b": factor(w.factors["b"])})


def _scale(w: Virtual) -> jax.Array:
    """That of the chosen adapter; 0 for the base."""
    index = w.factors["index"]
    return jnp.where(index < 0, 0, w.factors["scale"][jnp.maximum(index, 0)])


def _without_slot(names: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(name for name in names if name != SLOT)


def chosen_weight(
    site: Site, base: Any, a: Any, b: Any, scale: Any, index: Any, key: Any = None, **settings: Any
) -> Virtual:  # fmt: skip
    """The virtual weight of a whole parameter."""
    lead, inner, outer = site.atoms_of("l"), site.atoms_of("i"), site.atoms_of("o")
    dims = tuple(tuple(atom for atom in site.atoms if atom.axis == d) for d in range(len(site.shape)))
    axes = (
        ("a", (*lead, *inner, SLOT, RANK)), ("b", (*lead, SLOT, RANK, *outer)), ("index", ()), ("scale", (SLOT,)),
    )  # fmt: skip
    return Virtual(
        base=base, factors={"a": a, "b": b, "scale": scale, "index": index}, key=key, dims=dims, axes=axes,
        sizes=(), dropped=(), kind=Chosen(site, **settings),
    )  # fmt: skip
