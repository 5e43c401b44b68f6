"""Whether a model can still get parameters: not in what has counted them already, and not adapted by others."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

# What PEFT's and torchtune's layers call their factors.
_FACTORS = ("lora_A", "lora_a")


def check_whole(model: nn.Module, targets: Iterable[str]) -> None:
    """Raises for the first of `targets`, linear layers of `model` by name, that lies in a wrapper or in an adapter.

    DDP and FSDP look for parameters when they wrap a model: of later ones no gradient is ever reduced, and FSDP2 would
    hand a layer its whole weight beside split factors.

    **Raises:** `ValueError`.
    """
    for name in targets:
        where = f"{name}: " if name else ""
        for holder in _around(model, name):
            if wrapper := _wrapper(holder):
                raise ValueError(
                    f"{where}the model is in {wrapper} already, which would not see the adapter's parameters: adapt "
                    "first, and wrap afterwards"
                )
            if not isinstance(holder, nn.Linear) and any(each in holder._modules for each in _FACTORS):
                raise ValueError(
                    f"{where}is a part of the adapter of a {type(holder).__name__} already: adapt a fresh model, or "
                    "leave this layer out of the targets"
                )


def _around(model: nn.Module, name: str) -> Iterable[nn.Module]:
    """`model`, the modules on the way down to `name`, and that one."""
    yield model
    for part in filter(None, name.split(".")):
        model = getattr(model, part)
        yield model


def _wrapper(module: nn.Module) -> str | None:
    if isinstance(module, DistributedDataParallel):
        return "DistributedDataParallel"
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # where nobody has imported it, nothing is in it
    if fsdp is None:
        return None
    if isinstance(module, fsdp.FullyShardedDataParallel):
        return "FullyShardedDataParallel"
    return "fully_shard" if isinstance(module, fsdp.FSDPModule) else None
