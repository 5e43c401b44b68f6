"""What a `LoraModel` remembers beside factors: of each adapter, and of a base that an initialiser changed."""

from __future__ import annotations

import dataclasses

from flax import nnx

from lora_jax.adapters import Adapter
from lora_jax.peft.config import LoraConfig
from lora_jax.planning import Plan
from lora_jax.sites import Site


class FrozenLoRA(nnx.Variable):
    """A factor of an adapter that is not trained now: an optimizer with `wrt=nnx.LoRAParam` leaves it alone."""


@dataclasses.dataclass(frozen=True)
class Known:
    """What is remembered of one adapter beside its factors.

    `plan`: its sites are the adapter's; `made`: the sites that it was made with, to which scales are relative.
    """

    plan: Plan
    config: LoraConfig
    made: tuple[Site, ...]


@dataclasses.dataclass(frozen=True)
class Moved:
    """What the base of a model gave to its first adapter: `init` moved it, `start` are the factors it went to."""

    init: str
    plan: Plan
    start: Adapter


def replanned(plan: Plan, adapter: Adapter) -> Plan:
    """The plan with the adapter's own sites."""
    return plan if plan.sites == adapter.sites else dataclasses.replace(plan, sites=adapter.sites)
