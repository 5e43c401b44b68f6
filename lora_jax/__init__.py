"""LoRA for any Flax model: a functional transform that leaves the base parameters untouched.

Names load when they are used. So `lora_jax.kernels.triton_*`, which need neither jax nor torch, can be imported where
there is no jax: `lora_torch` runs them on torch tensors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax import checkpoint as checkpoint
    from lora_jax import inits as inits
    from lora_jax import linen as linen
    from lora_jax import nnx as nnx
    from lora_jax import ops as ops
    from lora_jax import optimizers as optimizers
    from lora_jax import peft as peft
    from lora_jax.adapters import Adapter as Adapter
    from lora_jax.bank import AdapterBank as AdapterBank
    from lora_jax.bank import AdapterStack as AdapterStack
    from lora_jax.combining import combine as combine
    from lora_jax.comparing import compare as compare
    from lora_jax.config import LoRAConfig as LoRAConfig
    from lora_jax.editing import rename as rename
    from lora_jax.editing import rescale as rescale
    from lora_jax.editing import resize as resize
    from lora_jax.editing import select as select
    from lora_jax.editing import without as without
    from lora_jax.explaining import Explanation as Explanation
    from lora_jax.explaining import explain as explain
    from lora_jax.extracting import extract as extract
    from lora_jax.functional import MaterialisedWarning as MaterialisedWarning
    from lora_jax.functional import apply as apply
    from lora_jax.many import apply_many as apply_many
    from lora_jax.merging import merge as merge
    from lora_jax.merging import unmerge as unmerge
    from lora_jax.merging import weight_norms as weight_norms
    from lora_jax.planning import Plan as Plan
    from lora_jax.planning import plan as plan
    from lora_jax.replication import replicate_layers as replicate_layers
    from lora_jax.sites import Site as Site
    from lora_jax.slots import active_slots as active_slots
    from lora_jax.slots import fresh_slot as fresh_slot
    from lora_jax.slots import per_slot as per_slot
    from lora_jax.status import layer_status as layer_status
    from lora_jax.status import model_status as model_status
    from lora_jax.status import print_trainable_parameters as print_trainable_parameters
    from lora_jax.undropped import InertDropoutWarning as InertDropoutWarning

__version__ = "0.1.0"

# Public name -> the module that defines it; a submodule is its own.
_HOME = {
    "active_slots": "slots",
    "Adapter": "adapters",
    "AdapterBank": "bank",
    "AdapterStack": "bank",
    "apply": "functional",
    "apply_many": "many",
    "checkpoint": "checkpoint",
    "combine": "combining",
    "compare": "comparing",
    "explain": "explaining",
    "Explanation": "explaining",
    "extract": "extracting",
    "fresh_slot": "slots",
    "InertDropoutWarning": "undropped",
    "inits": "inits",
    "layer_status": "status",
    "linen": "linen",
    "LoRAConfig": "config",
    "MaterialisedWarning": "functional",
    "merge": "merging",
    "model_status": "status",
    "nnx": "nnx",
    "ops": "ops",
    "optimizers": "optimizers",
    "peft": "peft",
    "per_slot": "slots",
    "Plan": "planning",
    "plan": "planning",
    "print_trainable_parameters": "status",
    "rename": "editing",
    "replicate_layers": "replication",
    "rescale": "editing",
    "resize": "editing",
    "select": "editing",
    "Site": "sites",
    "unmerge": "merging",
    "weight_norms": "merging",
    "without": "editing",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
    module = importlib.import_module(f"lora_jax.{_HOME[name]}")
    found = module if _HOME[name] == name else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
