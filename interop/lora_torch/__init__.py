"""The PyTorch side of lora_jax: state dicts, PEFT directories and torch modules.

Names load when they are used, so `import lora_torch` imports neither torch nor jax; the converters never need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dialects import translate as translate
    from .exchange import adapter_from_torch as adapter_from_torch
    from .exchange import adapter_to_torch as adapter_to_torch
    from .exchange import load_torch_adapter as load_torch_adapter
    from .layouts import Layout as Layout
    from .naming import Naming as Naming
    from .naming import module_index as module_index
    from .naming import module_name as module_name
    from .naming import module_names as module_names
    from .naming import torch_name as torch_name
    from .naming import torch_names as torch_names
    from .optimizer_state import optimizer_from_torch as optimizer_from_torch
    from .optimizer_state import optimizer_to_torch as optimizer_to_torch
    from .peft_dir import save_peft as save_peft
    from .peft_dir import target_names as target_names
    from .peft_load import load_peft as load_peft
    from .peft_plan import config_for as config_for
    from .peft_plan import plan_peft as plan_peft
    from .peft_read import read_peft as read_peft
    from .problems import StateDictError as StateDictError
    from .rotary import rotary_to_half as rotary_to_half
    from .rotary import rotary_to_interleaved as rotary_to_interleaved
    from .rules import Preset as Preset
    from .rules import Rule as Rule
    from .state_dict import from_torch_state_dict as from_torch_state_dict
    from .state_dict import to_torch_state_dict as to_torch_state_dict
    from .state_files import read_state_dict as read_state_dict
    from .state_files import write_state_dict as write_state_dict
    from .torchtune_names import TuneDecoder as TuneDecoder

# Public name -> the module that defines it.
_HOME = {
    "Layout": "layouts",
    "Naming": "naming",
    "Preset": "rules",
    "Rule": "rules",
    "StateDictError": "problems",
    "TuneDecoder": "torchtune_names",
    "adapter_from_torch": "exchange",
    "adapter_to_torch": "exchange",
    "config_for": "peft_plan",
    "from_torch_state_dict": "state_dict",
    "load_peft": "peft_load",
    "load_torch_adapter": "exchange",
    "module_index": "naming",
    "module_name": "naming",
    "module_names": "naming",
    "optimizer_from_torch": "optimizer_state",
    "optimizer_to_torch": "optimizer_state",
    "plan_peft": "peft_plan",
    "read_peft": "peft_read",
    "read_state_dict": "state_files",
    "rotary_to_half": "rotary",
    "rotary_to_interleaved": "rotary",
    "save_peft": "peft_dir",
    "target_names": "peft_dir",
    "to_torch_state_dict": "state_dict",
    "torch_name": "naming",
    "torch_names": "naming",
    "translate": "dialects",
    "write_state_dict": "state_files",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
