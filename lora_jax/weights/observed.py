"""A weight that stays what it is and shows what it is multiplied by: how data-driven initialisers see inputs.

It has no factors to compute with, but two arrays of numbers that follow every rearrangement of the weight as factors
do: `layer` over the lead axes, so that a scanned stack knows whose input it meets, and `place` over the in axes, so
that inputs are put in the parameter's own order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import _compat
from lora_jax.ops.contract import reorder
from lora_jax.recording import Recorder
from lora_jax.sites import Site
from lora_jax.weights.lookup import Picks, picked
from lora_jax.weights.virtual import DotGeneral, Running, Virtual

LAYER, PLACE = "layer", "place"

# (state of one layer, rows of inputs (n, fan_in), weights of the rows (n,)) -> state
Update = Callable[[Any, jax.Array, jax.Array], Any]
# The shape of the data's own axes -> a weight for each of its rows, or None for ones.
Mask = Callable[[tuple[int, ...]], jax.Array | None]


@dataclass(frozen=True)
class Observed(Running):
    """An unchanged parameter; each of its inputs goes through `update` into `recorder.state[name]`.

    The state is a tree whose leaves have the layers as their first axis. Where the recorder has no state for the
    parameter (the condition of a loop, the inside of a `shard_map`), nothing is recorded.
    """

    site: Site
    recorder: Recorder
    update: Update
    mask: Mask

    @property
    def name(self) -> str:
        return self.site.name

    def materialise(self, w: Virtual) -> jax.Array:
        return w.base

    def dot_general(self, w: Virtual, x: jax.Array, dot: DotGeneral, key: Any, eqn: Any) -> None:
        """Records; the product itself is the base's."""
        _, inner = w.live_factor(PLACE)
        summed = {atom for atom in dot.w if atom in dot.x and atom not in dot.y}
        if dot.needs_array or set(inner) != summed or not self._records(w, x):
            return
        _, layers = w.live_factor(LAYER)
        batch = tuple(name for name in layers if name in dot.x)
        rows = tuple(name for name in dot.x if name not in batch and name not in summed)
        x = reorder(_compat.whole(x).reshape(dot.split_x), dot.x, (*batch, *rows, *inner))
        self._record(w, x, batch, len(rows))

    def conv(self, w: Virtual, x: jax.Array, key: Any, eqn: Any) -> None:
        p = eqn.params
        numbers, groups = p["dimension_numbers"], p["feature_group_count"]
        _, inner = w.live_factor(PLACE)
        out, channel, *window = numbers.rhs_spec
        order = [atom for d in (channel, *window) for atom in w.dims[d]]
        if p["batch_group_count"] != 1 or set(inner) != set(order) or not self._records(w, x):
            return
        patches = lax.conv_general_dilated_patches(
            x, [w.base.shape[d] for d in window], p["window_strides"], p["padding"], p["lhs_dilation"],
            p["rhs_dilation"], numbers,
        )  # fmt: skip
        # (n, ..., groups * channels * window): the rows are places of the output, once for each group.
        patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
        rows = (*patches.shape[:-1], groups)
        patches = patches.reshape(*rows, *(w.size(atom) for atom in order))
        names = tuple(f"x{n}" for n in range(len(rows)))
        self._record(w, reorder(patches, (*names, *order), (*names, *inner)), (), len(rows))

    def ragged_dot(self, w: Virtual, x: jax.Array, sizes: jax.Array, key: Any, eqn: Any) -> None:
        _, inner = w.live_factor(PLACE)
        layers, axes = w.live_factor(LAYER)
        if set(inner) != set(w.dims[1]) or tuple(axes) != w.dims[0] or not self._records(w, x):
            return
        x = reorder(x.reshape(-1, *map(w.size, w.dims[1])), ("x0", *w.dims[1]), ("x0", *inner))
        rows = self._in_place(w, x.reshape(1, len(x), -1))[0]
        if self.mask((len(x),)) is not None:
            raise ValueError(
                f"`{self.name}` meets tokens sorted by expert, to which `mask` has no relation: leave it out."
            )
        sizes = jnp.asarray(sizes)
        ends = jnp.cumsum(sizes)
        at = jnp.arange(len(x))

        def one(state: Any, n: jax.Array) -> tuple[Any, None]:
            mine = (at < ends[n]) & (at >= ends[n] - sizes[n])
            return self._updated(state, jnp.ravel(layers)[n], rows, mine.astype(rows.dtype)), None

        self.recorder.state[self.name], _ = lax.scan(one, self.recorder.state[self.name], jnp.arange(len(sizes)))

    def gather(self, w: Virtual, picks: Picks, indices: jax.Array, eqn: Any) -> jax.Array | Virtual:
        """A choice of layers goes on being observed; a lookup has no input to observe."""
        if any(w.carriers(w.dims[d][0]) != (LAYER,) for d in picks):
            return _compat.bind(eqn, [w.base, indices])[0]
        return picked(w.replace(factors={**w.factors, LAYER: jnp.asarray(w.factors[LAYER])}), picks, indices, eqn)

    def times(self, w: Virtual, factor: Callable[[jax.Array], jax.Array]) -> Virtual:
        return w.replace(base=factor(w.base))

    def _records(self, w: Virtual, x: jax.Array) -> bool:
        """Whether there is somewhere to record to, and the whole input to record."""
        whole = math.prod(w.live_factor(PLACE)[0].shape) == self.site.fan_in
        return whole and self.name in self.recorder.state and jnp.issubdtype(x.dtype, jnp.floating)

    def _record(self, w: Virtual, x: jax.Array, batch: Sequence[Any], rows: int) -> None:
        """`x` is (*batch, *rows, *in in the order of `place`), with the layers' axes in `batch` first."""
        layers, axes = w.live_factor(LAYER)
        layers = reorder(jnp.asarray(layers), axes, (*batch, *(name for name in axes if name not in batch)))
        groups = math.prod(x.shape[: len(batch)])
        data = x.shape[len(batch) : len(batch) + rows]
        inputs = self._in_place(w, x.reshape(groups, math.prod(data), -1))
        weights = self.mask(data)
        weights = jnp.ones(inputs.shape[1], inputs.dtype) if weights is None else weights.astype(inputs.dtype)
        layers = layers.reshape(groups, -1)
        state = self.recorder.state[self.name]
        if layers.size == 1:
            self.recorder.state[self.name] = self._updated(state, layers[0, 0], inputs[0], weights)
            return
        # One after the other, because several rows may have chosen the same layer.
        pairs = jnp.stack(jnp.meshgrid(*map(jnp.arange, layers.shape), indexing="ij"), -1).reshape(-1, 2)

        def one(state: Any, pair: jax.Array) -> tuple[Any, None]:
            return self._updated(state, layers[pair[0], pair[1]], inputs[pair[0]], weights), None

        self.recorder.state[self.name], _ = lax.scan(one, state, pairs)

    def _in_place(self, w: Virtual, x: jax.Array) -> jax.Array:
        """`x` (..., in) with its columns in the parameter's order, in float32 or wider."""
        x = _compat.whole(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        place, _ = w.live_factor(PLACE)
        return x if isinstance(place, np.ndarray) else jnp.zeros_like(x).at[..., jnp.ravel(place)].set(x)

    def _updated(self, state: Any, layer: jax.Array, rows: jax.Array, weights: jax.Array) -> Any:
        new = self.update(jax.tree.map(lambda t: t[layer], state), rows, weights)
        return jax.tree.map(lambda t, n: t.at[layer].set(n.astype(t.dtype)), state, new)


def observed_weight(site: Site, base: Any, recorder: Recorder, update: Update, mask: Mask) -> Virtual:
    """The virtual weight of a whole parameter."""
    lead, inner = site.atoms_of("l"), site.atoms_of("i")
    dims = tuple(tuple(atom for atom in site.atoms if atom.axis == d) for d in range(len(site.shape)))
    # By numpy: an array that no rule has touched is known to be in order.
    numbers = {
        LAYER: np.arange(math.prod(site.sizes_of("l")), dtype=np.int32).reshape(site.sizes_of("l")),
        PLACE: np.arange(site.fan_in, dtype=np.int32).reshape(site.sizes_of("i")),
    }
    return Virtual(
        base=base, factors=numbers, key=None, dims=dims, axes=((LAYER, lead), (PLACE, inner)),
        sizes=(), dropped=(), kind=Observed(site, recorder, update, mask),
    )  # fmt: skip
