"""Adapting the linear layers of a model where they are: every name stays, every check comes before the first change."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import torch
from torch import nn

from .joining import joined
from .lora_config import PeftConfig, dtype_of
from .lora_experts import expert_rank, is_of_expert
from .lora_making import attach, new_adapter, unfit
from .lora_modules import LinearLoRA, TritonLinearLoRA
from .lora_whole import check_whole
from .matching import ModuleMatcher

logger = logging.getLogger(__name__)


def patch_linear_module(
    orig_linear: nn.Linear,
    dim: int = 8,
    alpha: float = 32,
    dropout: float = 0.0,
    dropout_position: str = "post",
    lora_A_init_method: str = "xavier",
    lora_dtype: torch.dtype | str | None = None,
    use_triton: bool = True,
    *,
    use_dora: bool = False,
    use_memory_efficient_lora: bool = True,
    layer_name: str | None = None,
) -> LinearLoRA:
    """Gives a linear layer an adapter and returns it, the same object: `weight` and `bias` stay and are frozen.

    Afterwards it is an instance of its former class and of `LinearLoRA` (`TritonLinearLoRA` with `use_triton`). A
    class with a forward of its own, as bitsandbytes', keeps it for the base. `layer_name` appears in error messages.
    Options as in `PeftConfig`; the positional ones are NeMo Automodel's.

    **Raises:** before anything is changed: `NotImplementedError` for what is not an `nn.Linear`, `ValueError` or
    `TypeError` for options out of range or a layer that cannot be adapted, `ModuleNotFoundError` with `use_triton`
    where triton is missing.
    """
    config = PeftConfig(
        dim=dim,
        alpha=alpha,
        dropout=dropout,
        dropout_position=dropout_position,  # pyright: ignore[reportArgumentType]
        lora_A_init=lora_A_init_method,
        lora_dtype=lora_dtype,
        use_triton=use_triton,
        use_dora=use_dora,
        use_memory_efficient_lora=use_memory_efficient_lora,
    )
    _check(orig_linear, config, layer_name)
    return _patch(orig_linear, new_adapter(orig_linear, config), config, layer_name)


def apply_lora_to_linear_modules(
    model: nn.Module,
    peft_config: PeftConfig,
    *,
    quantization_config: Any = None,
    skip_freeze: bool = False,
) -> int:
    """Freezes `model` and adapts the linear layers that `peft_config` names; returns how many.

    No module, parameter or key of the state dict changes its name; `<layer>.lora_A.weight` (dim, in) and
    `<layer>.lora_B.weight` (out, dim) are added. Modules may be on the meta device: no weight is read, except for
    DoRA's norms. Adapters that an earlier call has made stay trainable.

    - `quantization_config`: of bitsandbytes, for the dtype of the factors where `lora_dtype` is None: its
      `bnb_4bit_compute_dtype`, or bfloat16.
    - `skip_freeze`: leave parameters outside of the adapted layers as they are.

    **Raises:** before anything is changed: `ValueError` for a pattern that matches no linear layer, and whatever
    `patch_linear_module` raises, with the name of the layer in front.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}: write PeftConfig(...) or PeftConfig.from_dict")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")
    peft_config.check()
    found = _targets(model, peft_config.matcher())
    check_whole(model, found)
    if quantization_config is not None and peft_config.lora_dtype is None:
        compute = getattr(quantization_config, "bnb_4bit_compute_dtype", None) or "bfloat16"
        peft_config = _with(peft_config, lora_dtype=dtype_of(compute))
    configs = {name: peft_config for name in found}
    if peft_config.moe_rank_scaling:
        if not any(map(is_of_expert, found)):
            # Not an error: stages of a pipeline share a configuration.
            logger.warning("moe_rank_scaling: none of the %d layers to adapt is below a module `experts`", len(found))
        configs = {name: _with(peft_config, dim=expert_rank(model, name, peft_config.dim)) for name in found}
    for name, linear in found.items():
        _check(linear, configs[name], name)
        _check_is_called(model, name)
    made = {name: new_adapter(linear, configs[name]) for name, linear in found.items()}
    if not skip_freeze:
        adapters = [p for m in model.modules() if isinstance(m, LinearLoRA) for p in _trained(m)]
        keep = {id(p) for p in adapters}
        for parameter in model.parameters():
            if id(parameter) not in keep:
                parameter.requires_grad_(False)
    for name, linear in found.items():
        _patch(linear, made[name], configs[name], name)
    return len(found)


def _targets(model: nn.Module, matcher: ModuleMatcher) -> dict[str, nn.Linear]:
    """Every linear layer that is meant, by its first name; a layer used in two places is one."""
    inside = {id(part) for m in model.modules() if isinstance(m, LinearLoRA) for part in (m.lora_A, m.lora_B)}
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and id(module) not in inside
    }
    for option in ("target_modules", "exclude_modules"):
        for pattern in getattr(matcher, option):
            if not any(matcher.matches(pattern, name, name) for name in linears):
                raise ValueError(_unmatched(model, option, pattern, list(linears)))
    found: dict[int, tuple[str, nn.Linear]] = {}
    for name, linear in linears.items():
        if matcher.match(linear, name):
            found.setdefault(id(linear), (name, linear))
    if not found:
        raise ValueError(f"no linear layer is left to adapt, of {len(linears)} in {type(model).__name__}")
    return dict(found.values())


def _unmatched(model: nn.Module, option: str, pattern: str, linears: list[str]) -> str:
    others = [
        (name, module) for name, module in model.named_modules() if ModuleMatcher.matches(pattern, name, name) and name
    ]
    if others:
        name, module = others[0]
        return f"{option}: {pattern!r} matches {name!r}, a {type(module).__name__}, and no nn.Linear"
    message = f"{option}: {pattern!r} matches no linear layer of {type(model).__name__}; "
    if linears == [""]:
        return message + "it is one itself, without a name: call patch_linear_module, or write match_all_linear=True"
    if any(name.endswith("." + pattern) for name in linears):
        return message + f"patterns match whole names: write {'*.' + pattern!r}"
    close = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.3) or linears[:3]
    return message + (f"nearest: {', '.join(close)}" if close else "it has none")


def _check(linear: nn.Module, config: PeftConfig, name: str | None) -> None:
    reason = unfit(linear, config)
    if reason is not None:
        raise type(reason)(f"{name or 'the layer'}: {reason}")
    if config.use_triton:
        try:
            import triton  # noqa: F401
        except ModuleNotFoundError:
            where = f"{name}: " if name else ""
            raise ModuleNotFoundError(
                f"{where}use_triton=True needs triton: install `lora-jax[triton]`, or write use_triton=False",
                name="triton",
            ) from None


def _check_is_called(model: nn.Module, name: str) -> None:
    """Raises for a layer whose parent reads its weight and never calls it: its adapter would do nothing."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name}: nn.MultiheadAttention reads this layer's weight and does not call it, so an adapter would do "
            f"nothing: leave it out, with exclude_modules=[{name!r}] or narrower target_modules"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"{name}: the fast path of nn.TransformerEncoderLayer, taken in eval mode, reads this layer's weight and "
            "would leave the adapter out: call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def _patch(linear: nn.Linear, adapter: Any, config: PeftConfig, name: str | None) -> LinearLoRA:
    attach(linear, adapter, config, name)
    linear.__class__ = joined(TritonLinearLoRA if config.use_triton else LinearLoRA, type(linear))
    assert isinstance(linear, LinearLoRA)
    return linear


def _trained(module: LinearLoRA) -> list[torch.Tensor]:
    factors = [module.lora_A.weight, module.lora_B.weight]
    return factors if module.lora_magnitude is None else [*factors, module.lora_magnitude]


def _with(config: PeftConfig, **changes: Any) -> PeftConfig:
    return PeftConfig(**{**vars(config), **changes})
