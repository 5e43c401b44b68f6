"""Questions about a model of adapter modules, and what is set on all of them at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from lora_torch.patterns import nearest

# Linear layers of torchtune's attention that can be adapted.
LORA_ATTN_MODULES = Literal["q_proj", "k_proj", "v_proj", "output_proj"]


@runtime_checkable
class AdapterModule(Protocol):
    """A module that says which of its parameters the adapter trains, by names relative to itself."""

    def adapter_params(self) -> list[str]: ...


def is_adapter_module(module: nn.Module) -> bool:
    return callable(getattr(module, "adapter_params", None))


def get_adapter_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their full names, in the order of the modules.

    **Raises:** `AssertionError` if a module names a parameter that it does not have.
    """
    out: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if is_adapter_module(module):
            own = dict(module.named_parameters())
            wanted: list[str] = module.adapter_params()  # type: ignore[operator]
            if missing := [name for name in wanted if name not in own]:
                raise AssertionError(
                    f"Adapter params {missing} not converted: {type(module).__name__} at `{prefix or '(root)'}` lists "
                    f"them, but its parameters are {sorted(own)}"
                )
            out |= {f"{prefix}.{name}" if prefix else name: own[name] for name in own if name in wanted}
    return out


def set_trainable_params(model: nn.Module, adapter_params: Mapping[str, Any] | Collection[str]) -> None:
    """Leaves exactly the named parameters trainable.

    **Raises:** `ValueError` for names that the model does not have; no parameter is changed then.
    """
    own = dict(model.named_parameters())
    if unknown := [name for name in adapter_params if name not in own]:
        raise ValueError(
            f"the model has no parameters {unknown[:5]}{nearest(unknown[0], own)}. Names are those of "
            "`model.named_parameters()`; `get_adapter_params(model)` makes them"
        )
    for name, parameter in own.items():
        parameter.requires_grad_(name in adapter_params)


def get_adapter_state_dict(state_dict: Mapping[str, Any], device: str | None = "cpu") -> dict[str, Any]:
    """The entries whose name contains `lora` or `magnitude`, moved to `device`."""
    return {name: value.to(device) for name, value in state_dict.items() if is_adapter_key(name)}


def is_adapter_key(name: str) -> bool:
    return "lora" in name or "magnitude" in name


def get_lora_module_names(
    lora_attn_modules: list[LORA_ATTN_MODULES], apply_lora_to_mlp: bool, apply_lora_to_output: bool
) -> list[str]:
    """Local names of the adapted linear layers of a torchtune decoder, in a new list."""
    mlp = ["w1", "w2", "w3"] if apply_lora_to_mlp else []
    return [*lora_attn_modules, *mlp, *(["output"] if apply_lora_to_output else [])]


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Runs its block with every adapter off, for example to get a reference model's outputs.

    Afterwards, exceptions included, each module is as it was before: one that had been off stays off.
    """
    before = [
        (module, module.disabled)
        for module in model.modules()
        if is_adapter_module(module) and hasattr(module, "disabled")
    ]
    try:
        for module, _ in before:
            module.disabled = True  # type: ignore[attr-defined]
        yield
    finally:
        for module, disabled in before:
            module.disabled = disabled  # type: ignore[attr-defined]
