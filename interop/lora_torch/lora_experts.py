"""Smaller adapters for the experts of a mixture, because several of them answer for one token."""

from __future__ import annotations

import logging

from torch import nn

logger = logging.getLogger(__name__)

# How models call the number of experts that a token goes to.
COUNTS = ("n_activated_experts", "num_experts_per_tok", "num_experts_per_token", "top_k", "moe_top_k")


def is_of_expert(name: str) -> bool:
    """Whether the layer `name` is below a module called `experts`."""
    return "experts" in name.split(".")[:-1]


def expert_rank(model: nn.Module, name: str, dim: int) -> int:
    """The rank of the linear layer `name`: `dim // active experts` if it is an expert's (`is_of_expert`), else `dim`.

    The number of active experts is looked for on the modules around it and their `config`, nearest first.

    **Raises:** `ValueError` if it is nowhere, or leaves a rank of 0. A remainder is reported in the log.
    """
    if not is_of_expert(name):
        return dim
    parts = name.split(".")
    active = _active_experts(model, parts[: parts.index("experts") + 1])
    if active is None:
        raise ValueError(
            f"{name}: moe_rank_scaling found no number of active experts (any of {', '.join(COUNTS)}) on the modules "
            "around it or their config; set one of them, or leave moe_rank_scaling out"
        )
    if dim < active:
        raise ValueError(
            f"{name}: moe_rank_scaling shares dim={dim} among {active} active experts, which leaves no rank: write "
            f"dim={active} or more"
        )
    if dim % active:
        logger.warning("%s: dim=%d is no multiple of %d active experts: rank %d", name, dim, active, dim // active)
    return dim // active


def _active_experts(model: nn.Module, parts: list[str]) -> int | None:
    for depth in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        for holder in (module, getattr(module, "config", None)):
            for count in COUNTS:
                value = getattr(holder, count, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
    return None
