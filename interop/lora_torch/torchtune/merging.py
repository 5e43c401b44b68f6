"""A state dict with its adapters folded into the base weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from .adapters import is_adapter_key
from .base import gain
from .nf4 import dequantised

# Of a linear layer; of experts kept as one tensor for each projection.
_LINEAR = re.compile(r"(?:(?P<module>.+)\.)?(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
_EXPERTS = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<projection>gate|up|down)_(?P<part>[ab])")
_PARTS = {"lora_a.weight": "a", "lora_b.weight": "b"}


@torch.no_grad()
def get_merged_lora_ckpt(
    state_dict: dict[str, Any], rank: int, alpha: float, use_distributed_barriers: bool = False
) -> dict[str, Any]:
    """Replaces every base weight by the merged one and deletes the adapter's entries, in place.

    - LoRA: `W + (alpha / rank) * B A`.
    - DoRA: the rows of that, scaled to the length `magnitude`; the bias is scaled alike, as `DoRALinear` does.
    - Experts, `{m}.lora_{gate|up|down}_a` (E, in, rank) and `_b` (E, rank, out): `{m}.{p}_proj + (alpha / rank) * A B`.

    Each weight keeps its dtype and is rounded to it once; an NF4 weight becomes a dense one. Tensors are replaced, not
    written to, so a model that shares them with the dict stays as it is.

    **Arguments:** `use_distributed_barriers`, whether all ranks wait for one another after each module, so that their
    memory peaks do not drift apart.

    **Returns:** `state_dict` itself.

    **Raises:** `ValueError` listing every adapter without a base or with a part missing, every shape that does not fit,
    every rank that is not `rank`, every base that holds no floats, and tensors of which only some are on the meta
    device; for an alpha that is not finite, and for barriers without a process group. The dict is left as it was.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"`alpha` must be finite, got {alpha!r}")
    if use_distributed_barriers and not torch.distributed.is_initialized():
        raise ValueError("`use_distributed_barriers=True` needs a process group; call it with False on one process")
    found, problems = _find(state_dict)
    for weight, parts in found.items():
        problems += _check(weight, parts, state_dict, rank)
    if problems:
        raise ValueError("the state dict cannot be merged:\n" + "\n".join(f"  {text}" for text in problems))
    for weight, parts in found.items():
        _merge(weight, parts, state_dict, alpha / rank)
        for key in parts.values():
            del state_dict[key]
        if use_distributed_barriers:
            torch.distributed.barrier()
    return state_dict


def _find(state_dict: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys of the factors by their base weight, `{weight: {part: key}}`, and what belongs to none."""
    found: dict[str, dict[str, str]] = {}
    problems = []
    for key in filter(is_adapter_key, state_dict):
        if match := _LINEAR.fullmatch(key):
            weight, part = _join(match["module"], "weight"), _PARTS.get(match["part"], match["part"])
        elif match := _EXPERTS.fullmatch(key):
            weight, part = _join(match["module"], f"{match['projection']}_proj"), f"expert_{match['part']}"
        else:
            problems.append(f"{key}: no factor has this name; rename or remove it")
            continue
        found.setdefault(weight, {})[part] = key
    return found, problems


def _check(weight: str, parts: Mapping[str, str], state_dict: Mapping[str, Any], rank: int) -> list[str]:
    experts = "expert_a" in parts or "expert_b" in parts
    names = ("expert_a", "expert_b") if experts else ("a", "b")
    if missing := [name[-1] for name in names if name not in parts]:
        return [f"{', '.join(parts.values())}: no lora_{' and no lora_'.join(missing)} beside it"]
    if weight not in state_dict:
        return [f"{parts[names[0]]}: there is no base weight {weight}; merge the full state dict, not the adapter's"]
    shape, a, b = (tuple(state_dict[key].shape) for key in (weight, parts[names[0]], parts[names[1]]))
    if experts:
        want_a, want_b = (shape[0], shape[1], rank), (shape[0], rank, shape[2])
    else:
        want_a, want_b = (rank, shape[1]), (shape[0], rank)
    if (a, b) != (want_a, want_b):
        return [f"{weight} {shape} takes factors {want_a} and {want_b} at `rank={rank}`, found {a} and {b}"]
    tensors = [state_dict[key] for key in (weight, *parts.values())]
    if not tensors[0].is_floating_point():
        return [f"{weight} is {tensors[0].dtype}, which would cut off the update: dequantise it first"]
    if len({tensor.is_meta for tensor in tensors}) > 1:
        return [f"{weight} and its factors: some are on the meta device and hold no values; load them first"]
    if "magnitude" in parts and (m := tuple(state_dict[parts["magnitude"]].shape)) != shape[:1]:
        return [f"{parts['magnitude']} is {m}, but {weight} is {shape}"]
    return []


def _merge(weight: str, parts: Mapping[str, str], state_dict: dict[str, Any], scale: float) -> None:
    base = dequantised(state_dict[weight])
    wide = torch.promote_types(base.dtype, torch.float32)
    # `get_adapter_state_dict` brings an adapter to the CPU, the base may be on a GPU.
    of = {part: state_dict[key].to(base.device, wide) for part, key in parts.items()}
    if "expert_a" in of:
        state_dict[weight] = (base.to(wide) + scale * (of["expert_a"] @ of["expert_b"])).to(base.dtype)
        return
    merged = base.to(wide) + scale * (of["b"] @ of["a"])
    if "magnitude" in of:
        g = gain(of["magnitude"], torch.linalg.vector_norm(merged, dim=1))
        merged = g[:, None] * merged
        bias = weight.removesuffix("weight") + "bias"
        if bias in state_dict:
            state_dict[bias] = (g * state_dict[bias].to(wide)).to(state_dict[bias].dtype)
    state_dict[weight] = merged.to(base.dtype)


def _join(module: str | None, name: str) -> str:
    return f"{module}.{name}" if module else name
