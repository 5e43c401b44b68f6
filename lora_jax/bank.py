"""Several adapters of one model side by side: a stack of their arrays, and a bank that knows them by name.

`AdapterStack` is what a compiled function sees: arrays with a slot for each adapter, and nothing that changes when one
comes or goes. `AdapterBank` stays on the host: which name is in which slot, and with what rank and alpha.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax.adapters import Adapter, expected_leaves, leaf_at, nested
from lora_jax.editing import check_only_factors, rescaled, ungrouped
from lora_jax.sites import LORA_A, LORA_B, Site

BASE = "__base__"
NO_ADAPTER = -1


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class AdapterStack:
    """The arrays of a bank; a pytree.

    **Fields:**

    - `factors`: nested as an adapter's, every leaf with an axis of slots, that of low rank before the rank: `lora_A`
      (*lead, *in, slots, rank), `lora_B` (*lead, slots, rank, *out), copies of `modules_to_save` (slots, *shape). What
      trains.
    - `scales`: `{parameter: (slots,)}` in float32 (float64 for float64 factors); 0 where a slot does not adapt the
      parameter. Not trained.
    - `sites`: the adapted parameters, with the rank that the slots have room for.
    """

    factors: dict[str, Any]
    scales: dict[str, jax.Array]
    sites: tuple[Site, ...]

    @property
    def slots(self) -> int:
        return next(iter(self.scales.values())).shape[0]

    def with_factors(self, factors: Mapping[str, Any]) -> AdapterStack:
        """The same stack with other factors, for `jax.grad` and after an optimizer's step."""
        return replace(self, factors=dict(factors))

    def leaf(self, path: tuple[str, ...]) -> Any:
        return leaf_at(self.factors, path)

    def slot_axes(self) -> dict[str, Any]:
        """The position of the slots in each leaf of `factors`."""
        return nested({path: axis for site in self.sites for path, axis in _slot_axes(site).items()})

    def tree_flatten(self):
        return (self.factors, self.scales), self.sites

    @classmethod
    def tree_unflatten(cls, sites, children) -> AdapterStack:
        factors, scales = children
        return cls(factors, scales, sites)


@dataclass(frozen=True, eq=False)
class AdapterBank:
    """Adapters by name in the slots of a stack. Every method returns a new bank and leaves this one as it is.

    `stack` is the argument of compiled functions; no method changes its shapes, so that none compiles them again.
    `names` and `sites` are those of each slot, None where it is free.
    """

    stack: AdapterStack
    names: tuple[str | None, ...]
    sites: tuple[tuple[Site, ...] | None, ...]

    @classmethod
    def create(
        cls, sites: Sequence[Site], slots: int, *, rank: int | None = None, dtype: Any = "float32"
    ) -> AdapterBank:
        """An empty bank for the parameters of a plan: `AdapterBank.create(plan.sites, slots=8)`.

        **Arguments:**

        - `slots`: how many adapters there is room for.
        - `rank`: the largest rank that a slot can hold; each parameter's own in the plan if None.
        - `dtype`: of the factors. float32 to train; for serving the base's, which saves a cast at every call.

        **Raises:** `ValueError` for no slots or no rank, or for more than factors and copies (DoRA, whose norms belong
        to one adapter, `lora_bias`, token rows); `TypeError` for a dtype that is not floating point, or something else
        than sites.
        """
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise ValueError(f"`slots={slots!r}` must be a positive whole number.")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"`rank={rank!r}` must be a positive whole number, or None for each parameter's own.")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"`dtype={jnp.dtype(dtype).name}` cannot hold factors; use 'float32' or 'bfloat16'.")
        if not isinstance(sites, Sequence):
            raise TypeError(f"`sites` is a {type(sites).__name__}: write `AdapterBank.create(plan.sites, ...)`.")
        if not sites:
            raise ValueError("`sites` is empty: the plan adapts nothing.")
        check_only_factors([site for site in sites if not site.is_full], "a bank cannot hold")
        room = tuple(replace(site, group=1, rank=site.rank if rank is None or site.is_full else rank) for site in sites)
        leaves = {
            path: jnp.zeros((*site.leaves[path][:axis], slots, *site.leaves[path][axis:]), dtype)
            for site in room
            for path, axis in _slot_axes(site).items()
        }
        scales = {site.name: jnp.zeros(slots, jnp.promote_types(dtype, jnp.float32)) for site in room}
        return cls(AdapterStack(nested(leaves), scales, room), (None,) * slots, (None,) * slots)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if name is not None)

    def __len__(self) -> int:
        return sum(name is not None for name in self.names)

    def ids(self, names: Sequence[str]) -> np.ndarray:
        """The slot of each name as int32, -1 for `"__base__"`.

        **Raises:** `ValueError` for a name that is not in the bank; `TypeError` for a string in place of a list.
        """
        if isinstance(names, str):
            raise TypeError(f"`ids` takes a name for each part of the batch, got {names!r}: write [{names!r}].")
        return np.asarray([NO_ADAPTER if name == BASE else self.slot(name) for name in names], np.int32)

    def slot(self, name: str) -> int:
        """**Raises:** `ValueError` for a name that is not in the bank."""
        if name not in self.names:
            close = difflib.get_close_matches(str(name), list(self), n=2) or sorted(self)[:6]
            raise ValueError(f"there is no adapter {name!r} in the bank; there is {', '.join(close) or 'none'}.")
        return self.names.index(name)

    def add(self, name: str, adapter: Adapter) -> AdapterBank:
        """The bank with one more adapter, in its first free slot.

        A smaller rank is padded with zeros, and parameters that the adapter leaves alone stay the base's. QALoRA's
        factors become ordinary ones.

        **Raises:** `ValueError` if the name is taken, no slot is free, a rank is too large, the adapter adapts
        something else than the bank does, or it holds numbers that are not finite.
        """
        if name == BASE or not isinstance(name, str) or not name:
            raise ValueError(f"{name!r} cannot name an adapter; {BASE!r} stands for none.")
        if name in self.names:
            raise ValueError(f"there is an adapter {name!r} already: `replace` it, or `remove` it first.")
        if None not in self.names:
            raise ValueError(f"all {len(self.names)} slots are taken: `remove` an adapter, or create a larger bank.")
        return self._put(self.names.index(None), name, adapter)

    def replace(self, name: str, adapter: Adapter) -> AdapterBank:
        """The bank with another adapter in the slot of `name`. **Raises:** as `add`, and for an unknown name."""
        return self._put(self.slot(name), name, adapter)

    def remove(self, name: str) -> AdapterBank:
        """The bank without an adapter, whose slot computes the base from now on."""
        slot = self.slot(name)
        # Its factors too: where training diverged they are NaN, and zero times NaN is NaN in everybody's sums.
        return self._with(slot, None, None, self._filled(slot, {}, None))

    def rename(self, name: str, new: str) -> AdapterBank:
        """The bank with an adapter under another name."""
        slot = self.slot(name)
        if new in self.names or new == BASE:
            raise ValueError(f"{new!r} is taken already.")
        return self._with(slot, new, self.sites[slot], self.stack)

    def rescale(self, name: str, factor: float) -> AdapterBank:
        """The bank with `factor` times the change of one adapter; 0 turns it off."""
        slot = self.slot(name)
        sites = rescaled(self.sites[slot] or (), factor)
        scales = dict(self.stack.scales)
        for site in sites:
            scales[site.name] = scales[site.name].at[slot].set(site.scale)
        return self._with(slot, name, sites, replace(self.stack, scales=scales))

    def get(self, name: str) -> Adapter:
        """One adapter as it would be alone: its own ranks and alphas, ready to save, merge or combine."""
        slot = self.slot(name)
        leaves = {}
        for site in self.sites[slot] or ():
            for path, axis in _slot_axes(site).items():
                leaf = jnp.take(self.stack.leaf(path), slot, axis)
                leaves[path] = leaf[tuple(slice(0, n) for n in site.leaves[path])]
        return Adapter.from_leaves(leaves, self.sites[slot] or ())

    def with_factors(self, factors: Mapping[str, Any]) -> AdapterBank:
        """The bank after training: the same names with these factors."""
        return replace(self, stack=self.stack.with_factors(factors))

    def _put(self, slot: int, name: str, adapter: Adapter) -> AdapterBank:
        if not isinstance(adapter, Adapter):
            raise TypeError(f"{name!r} must be an Adapter, got {type(adapter).__name__}: it knows ranks and alphas.")
        adapter = ungrouped(adapter)
        own = {site.path: site for site in adapter.sites}
        _check_fits(name, own, {site.path: site for site in self.stack.sites})
        _refuse_not_finite(name, adapter)
        return self._with(slot, name, adapter.sites, self._filled(slot, own, adapter))

    def _filled(self, slot: int, own: Mapping[Any, Site], adapter: Adapter | None) -> AdapterStack:
        """The stack with an adapter's factors and scales in a slot, zeros where it has none."""
        leaves: dict[tuple[str, ...], Any] = {}
        scales = dict(self.stack.scales)
        for room in self.stack.sites:
            site = own.get(room.path)
            scales[room.name] = scales[room.name].at[slot].set(0.0 if site is None else site.scale)
            for path, at in _slot_axes(room).items():
                stack, shape = self.stack.leaf(path), room.leaves[path]
                value = np.zeros(shape, np.float32) if site is None or adapter is None else adapter.leaf(path)
                value = jnp.pad(value, [(0, n - k) for n, k in zip(shape, value.shape, strict=True)])
                leaves[path] = jax.lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), slot, at)
        return AdapterStack(nested(leaves), scales, self.stack.sites)

    def _with(self, slot: int, name: str | None, sites: tuple[Site, ...] | None, stack: AdapterStack) -> AdapterBank:
        def put(values: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
            return (*values[:slot], value, *values[slot + 1 :])

        return AdapterBank(stack, put(self.names, name), put(self.sites, sites))


def _check_fits(name: str, own: Mapping[Any, Site], room: Mapping[Any, Site]) -> None:
    problems = []
    for path, site in own.items():
        place = room.get(path)
        if place is None:
            problems.append(f"`{site.name}` is not in the bank")
        elif (site.shape, site.is_full, site.atoms, site.roles) != (
            place.shape, place.is_full, place.atoms, place.roles
        ):  # fmt: skip
            problems.append(f"`{site.name}` is {site.shape} with roles {site.roles!r}, in the bank {place.shape} with "
                            f"{place.roles!r}")  # fmt: skip
        elif site.rank > place.rank:
            problems.append(f"`{site.name}` has rank {site.rank}, and a slot has room for {place.rank}")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the adapter {name!r} does not fit: {'; '.join(problems[:4])}{more}.")


def _refuse_not_finite(name: str, adapter: Adapter) -> None:
    with jax.ensure_compile_time_eval():  # also in a function that `jit` traces, of an adapter from outside of it
        bad = [
            "/".join(path)
            for path in expected_leaves(adapter.sites)
            if not isinstance(leaf := adapter.leaf(path), Tracer) and not bool(jnp.isfinite(leaf).all())
        ]
    if bad:
        raise ValueError(
            f"the adapter {name!r} holds numbers that are not finite ({', '.join(bad[:3])}), which would spread to "
            "rows of other adapters: use an earlier checkpoint of it."
        )


def _slot_axes(site: Site) -> dict[tuple[str, ...], int]:
    """The position of the slots in each leaf: before the rank, and in any case after the stacked axes, so that a scan
    over layers finds them first."""
    if site.is_full:
        return dict.fromkeys(site.leaves, 0)
    a, b = (site.leaf_path(factor) for factor in (LORA_A, LORA_B))
    return {a: len(site.leaves[a]) - 1, b: len(site.atoms_of("l"))}
