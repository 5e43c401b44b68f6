"""Adapters of torchtune's decoders as PEFT stores them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_torch.dialects import translate
from lora_torch.torchtune_names import TARGETS, TuneDecoder

_REQUIRED = ("target_modules", "r", "lora_alpha")


def tune_to_peft_adapter_weights(
    state_dict: Mapping[str, Any],
    num_heads: int = 32,
    num_kv_heads: int = 32,
    dim: int = 4096,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """An adapter's state dict under PEFT's names, q and k in the row order of transformers.

    The rows of q's and k's `lora_b` **and of their magnitude** change from interleaved rotary order to halves.

    **Arguments:** `state_dict`, of the adapter alone (`get_adapter_state_dict`); the model's `num_heads`,
    `num_kv_heads` and `dim`, whose defaults are those of Llama 2 7B; `head_dim`, if it is not `dim // num_heads`.

    **Returns:** a new dict; only moved rows are new tensors.

    **Raises:** `ValueError` for a name that no such decoder has, or q or k whose rows are not the heads' rows.
    """
    decoder = _decoder(num_heads, num_kv_heads, dim, head_dim)
    return translate(state_dict, "torchtune", "peft-file", decoder=decoder)


def peft_to_tune_adapter_weights(
    state_dict: Mapping[str, Any],
    num_heads: int = 32,
    num_kv_heads: int = 32,
    dim: int = 4096,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """The exact inverse of `tune_to_peft_adapter_weights`, which torchtune lacks."""
    decoder = _decoder(num_heads, num_kv_heads, dim, head_dim)
    return translate(state_dict, "peft-file", "torchtune", decoder=decoder)


def _decoder(num_heads: int, num_kv_heads: int, dim: int, head_dim: int | None) -> TuneDecoder:
    # No heads at all are refused there, in words.
    return TuneDecoder(num_heads, num_kv_heads, head_dim or dim // max(num_heads, 1))


def tune_to_peft_adapter_config(
    adapter_config: Mapping[str, Any], base_model_name_or_path: str | None = None, *, use_dora: bool | None = None
) -> dict[str, Any]:
    """The contents of an `adapter_config.json`, from an adapter's configuration with torchtune's module names.

    **Arguments:** `adapter_config`, with at least `target_modules`, `r` and `lora_alpha`; it is not changed. PEFT also
    wants `peft_type`, `"LORA"`. `use_dora`: whether the adapter has magnitudes, which PEFT ignores unless this is
    stated; None leaves what the configuration says.

    **Raises:** `ValueError` for a missing entry or a module that a decoder does not have.
    """
    if missing := [key for key in _REQUIRED if key not in adapter_config]:
        raise ValueError(f"PEFT adapter config requires {list(_REQUIRED)}; {missing} missing in {list(adapter_config)}")
    if isinstance(adapter_config["target_modules"], str):
        raise ValueError(f"`target_modules` must be a list of names, got {adapter_config['target_modules']!r}")
    targets = list(adapter_config["target_modules"])
    if unknown := [name for name in targets if name not in TARGETS]:
        raise ValueError(f"Unknown target module {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    out = {**adapter_config, "target_modules": [TARGETS[name] for name in targets]}
    if use_dora is not None:
        out["use_dora"] = use_dora
    if base_model_name_or_path:
        out["base_model_name_or_path"] = base_model_name_or_path
    return out
