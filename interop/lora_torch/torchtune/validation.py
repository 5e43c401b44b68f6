"""Whether a base and an adapter, loaded one after the other with `strict=False`, have filled the model together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .adapters import LORA_ATTN_MODULES, get_lora_module_names, is_adapter_key


def validate_missing_and_unexpected_for_lora(
    lora_attn_modules: list[LORA_ATTN_MODULES] | None = None,
    apply_lora_to_mlp: bool | None = None,
    apply_lora_to_output: bool | None = None,
    state_dict_keys: Sequence[str] | None = None,
    base_missing: Sequence[str] | None = None,
    base_unexpected: Sequence[str] | None = None,
    lora_missing: Sequence[str] | None = None,
    lora_unexpected: Sequence[str] | None = None,
) -> None:
    """Judges what `load_state_dict(..., strict=False)` returned for the base and for the adapter.

    **Arguments:**

    - `lora_attn_modules`, `apply_lora_to_mlp`, `apply_lora_to_output`: deprecated. Without `state_dict_keys` all three
        are needed, and a key counts as the adapter's if it contains `<module>.lora` or `<module>.magnitude`.
    - `state_dict_keys`: names of the model's whole state dict; those with `lora` or `magnitude` are the adapter's.
    - `base_missing`, `base_unexpected`, `lora_missing`, `lora_unexpected`: the lists of the two calls; None for a call
        that was not made.

    **Raises:** `RuntimeError` with a line for every base key that the base lacked, adapter key that the adapter lacked,
    key that both lacked, and list of unexpected keys; `ValueError` without the means to tell the keys apart.
    """
    old = (lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output)
    if any(value is not None for value in old):
        warnings.warn(
            "`lora_attn_modules`, `apply_lora_to_mlp` and `apply_lora_to_output` are deprecated: pass "
            "`state_dict_keys=list(model.state_dict())`",
            FutureWarning,
            stacklevel=2,
        )
    base, lora = set(base_missing or ()), set(lora_missing or ())
    if state_dict_keys is not None:
        keys = set(state_dict_keys)
        ours = {key for key in keys if is_adapter_key(key)}
        missing = (base & lora) | (lora & ours) | (base & (keys - ours))
        lines = [_line(key, key in keys, key in ours) for key in (base_missing or ()) if key in missing]
        lines += [_line(key, key in keys, key in ours) for key in (lora_missing or ()) if key in missing - base]
    elif lora_attn_modules is None or apply_lora_to_mlp is None or apply_lora_to_output is None:
        raise ValueError("pass `state_dict_keys=list(model.state_dict())`: without it nothing tells the keys apart")
    else:
        modules = get_lora_module_names(lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output)
        pieces = [f"{module}.{part}" for module in modules for part in ("lora", "magnitude")]
        lines = [_line(k, True, False) for k in (base_missing or ()) if not any(piece in k for piece in pieces)]
        lines += [_line(k, True, True) for k in (lora_missing or ()) if any(piece in k for piece in pieces)]
    if base_unexpected:
        lines.append(f"Unexpected key loading base model: {', '.join(base_unexpected)}")
    if lora_unexpected:
        lines.append(f"Unexpected key loading adapter: {', '.join(lora_unexpected)}")
    if lines:
        raise RuntimeError("base and adapter do not fill the model:\n" + "\n".join(lines))


def _line(key: str, known: bool, is_lora: bool) -> str:
    if not known:
        return f"Unexpected key found missing: {key}"
    if is_lora:
        return f"Missing LoRA key {key} from adapter state dict"
    return f"Missing non-LoRA key {key} from base model dict"
