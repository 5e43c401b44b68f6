"""A linen module and its parameters as one nnx module, for the functions that take a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from lora_jax.nnx import Static, variables


class FromLinen(nnx.Module):
    """`model(x)` is `module.apply({"params": ..., **others}, x)`. Parameters are `nnx.Param`s, named as in linen."""

    def __init__(self, module: nn.Module, params: Mapping[str, Any], others: Mapping[str, Any]):
        self.module = Static(module)
        self.params = variables(params, nnx.Param)
        self.others = nnx.Dict({name: variables(tree, nnx.Variable) for name, tree in others.items()})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        collections = {"params": nnx.to_pure_dict(nnx.state(self.params, nnx.Param))}
        collections |= {name: nnx.to_pure_dict(nnx.state(tree)) for name, tree in self.others.items()}
        return self.module.value.apply(collections, *args, **kwargs)


def from_linen(module: nn.Module, params: Mapping[str, Any], **others: Mapping[str, Any]) -> FromLinen:
    """The module with its parameters, and other collections, which calls read and do not change (`batch_stats=...`)."""
    return FromLinen(module, params, others)
