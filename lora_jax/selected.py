"""One slot of a stack in the place of an adapter: what `apply` asks for weights when the adapter is a traced choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lora_jax import _compat
from lora_jax.bank import AdapterStack
from lora_jax.ops.many import part_by_part
from lora_jax.sites import LORA_A, LORA_B, Site
from lora_jax.weights.chosen import chosen_weight
from lora_jax.weights.virtual import Virtual


@dataclass(frozen=True, eq=False)
class Selected:
    """`index` is an integer scalar, negative for the base; `selection` as in `apply_many`."""

    stack: AdapterStack
    index: Any
    selection: str | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.stack.sites

    def check(self, sites: Sequence[Site]) -> None:
        """**Raises:** `ValueError` if the stack is not one for these parameters."""
        own, planned = ({s.path: (s.shape, s.is_full) for s in group} for group in (self.sites, sites))
        if own != planned:
            wrong = sorted(".".join(path) for path in own.keys() ^ planned.keys() or own.keys())
            raise ValueError(
                f"the bank is not one for this plan: they differ in {', '.join(wrong[:6])}. Make it of the plan's own "
                "sites, `AdapterBank.create(plan.sites, slots)`."
            )

    def full_copy(self, site: Site, base: Any) -> Any:
        """The slot's copy of a parameter of `modules_to_save`, or the base's value where it has none."""
        at = jnp.maximum(self.index, 0)
        copied = (self.index >= 0) & (self.stack.scales[site.name][at] != 0)
        return jnp.where(copied, self.stack.leaf(site.path)[at].astype(base.dtype), base)

    def weight(self, site: Site, base: Any, key: Any, dropout_rate: float) -> Virtual:
        """The virtual weight of a low-rank parameter."""
        a, b = (self.stack.leaf(site.leaf_path(factor)) for factor in (LORA_A, LORA_B))
        return chosen_weight(
            site, base, a, b, self.stack.scales[site.name], self.index, key,
            dropout_rate=dropout_rate, selection=self.selection,
        )  # fmt: skip


def bind_mapped(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs an equation that is to be mapped over the parts of a batch; grouped products, which JAX does not map over
    their data alone, go part by part."""
    if eqn.primitive.name not in ("ragged_dot", "ragged_dot_general"):
        return _compat.bind(eqn, values)
    return [part_by_part(lambda *operands: _compat.bind(eqn, operands)[0])(*values)]
