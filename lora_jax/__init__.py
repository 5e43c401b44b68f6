"""LoRA for any Flax model: a functional transform that leaves the base parameters untouched."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_jax.adapters import Adapter as Adapter
from lora_jax.config import LoRAConfig as LoRAConfig
from lora_jax.explaining import Explanation as Explanation
from lora_jax.explaining import explain as explain
from lora_jax.functional import MaterialisedWarning as MaterialisedWarning
from lora_jax.functional import apply as apply
from lora_jax.merging import merge as merge
from lora_jax.merging import unmerge as unmerge
from lora_jax.planning import Plan as Plan
from lora_jax.planning import plan as plan
from lora_jax.sites import Site as Site
from lora_jax.undropped import InertDropoutWarning as InertDropoutWarning

if TYPE_CHECKING:
    from lora_jax import checkpoint as checkpoint
    from lora_jax import inits as inits
    from lora_jax import linen as linen
    from lora_jax import nnx as nnx
    from lora_jax import ops as ops

__version__ = "0.1.0"

_LAZY = ("checkpoint", "inits", "linen", "nnx", "ops")


def __getattr__(name: str) -> Any:
    """Loads the front ends when they are used."""
    if name in _LAZY:
        return importlib.import_module(f"lora_jax.{name}")
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
