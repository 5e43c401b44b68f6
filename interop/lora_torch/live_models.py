"""What a torch model with adapters says of itself: which kind it is, its modules, and their scales."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .dialects import PEFT_PREFIX, DialectName
from .patterns import nearest

# A scale is one division; written down in another order it differs in the last bits.
_SAME = 1e-9
_WRAPPERS = ("_orig_mod.", "module.")


def module_scales(model: Any, adapter_name: str = "default") -> dict[str, tuple[DialectName, float]]:
    """`{module: (dialect, scale)}` of the adapted linear layers of a torch model, under plain names.

    The scale is what B(A(x)) is multiplied by. Nothing is imported: a layer is known by its attributes.
    """
    out: dict[str, tuple[DialectName, float]] = {}
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, Mapping) and hasattr(module, "lora_A"):
            if adapter_name in scaling and adapter_name in module.lora_A:
                out[name.removeprefix(PEFT_PREFIX)] = ("peft", float(scaling[adapter_name]))
        elif hasattr(module, "lora_a") and hasattr(module, "lora_b"):
            scale = module.alpha / module.rank if hasattr(module, "alpha") else scaling
            out[name] = ("torchtune", float(scale))  # type: ignore[arg-type]
        elif hasattr(module, "lora_A") and isinstance(getattr(module, "scale", None), int | float):
            out[name] = ("lora", float(module.scale))
    return out


def dialect_of(model: Any, adapter_name: str = "default") -> DialectName:
    """Which kind of model this is. **Raises** `ValueError` for one without adapters, or with several kinds."""
    found: set[DialectName] = {dialect for dialect, _ in module_scales(model, adapter_name).values()}
    if len(found) != 1:
        what = f"adapters of several kinds, {sorted(found)}" if found else f"no adapter ({adapter_name!r}, in PEFT)"
        raise ValueError(f"the torch model has {what}; adapt its linear layers in one way first")
    return found.pop()


def check_scales(model: Any, wanted: Mapping[str, float], adapter_name: str = "default") -> None:
    """Compares scales, which no state dict holds.

    **Arguments:** `wanted`, the scale of each module by its plain name.

    **Raises:** `ValueError` listing every module that only one side adapts, and every other scale.
    """
    have = {name: scale for name, (_, scale) in module_scales(model, adapter_name).items()}
    if wrapper := _wrapper(have, wanted):
        attribute = wrapper.removesuffix(".")
        raise ValueError(
            f"every adapted layer of the torch model is below `{attribute}`, of the {type(model).__name__} around it: "
            f"pass `model.{attribute}`"
        )
    problems = [
        f"{name} is adapted in JAX, not in the torch model{nearest(name, have)}" for name in wanted if name not in have
    ]
    problems += [
        f"{name} is adapted in the torch model, not in JAX{nearest(name, wanted)}"
        for name in have
        if name not in wanted
    ]
    problems += [
        f"{name} has the scale {have[name]:g} in the torch model and {scale:g} in JAX: use the same rank and alpha"
        for name, scale in wanted.items()
        if name in have and abs(have[name] - scale) > _SAME * abs(scale)
    ]
    raise_together("the torch model and the JAX adapter do not fit", problems)


def _wrapper(have: Collection[str], wanted: Collection[str]) -> str:
    """The prefix of `torch.compile`'s or DDP's module, if the names differ by it."""
    return next((each for each in _WRAPPERS if wanted and {each + name for name in wanted} == set(have)), "")


def check_writable(model: Any, adapter_name: str = "default") -> None:
    """**Raises** `ValueError` listing every adapted layer whose factors cannot be replaced.

    A merged layer would later take the new product off a base that holds the old one; a layer on the meta device keeps
    nothing of what is written.
    """
    problems = []
    adapted = module_scales(model, adapter_name)
    for full_name, layer in model.named_modules():
        name = full_name.removeprefix(PEFT_PREFIX)
        if name not in adapted:
            continue
        if getattr(layer, "merged", False) is True:
            problems.append(f"{name} has its adapter merged into the base: unmerge it first")
        if any(parameter.is_meta for part, parameter in layer.named_parameters() if "lora_" in part):
            problems.append(f"{name} has factors on the meta device, which keep no values: call `to_empty` first")
    raise_together("nothing can be written to the adapter of the torch model", problems)


def raise_together(what: str, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{what}:\n" + "\n".join(f"  {text}" for text in problems))
