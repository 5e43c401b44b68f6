"""Making an adapter for one linear layer: is the layer fit for it, its new parameters, and putting the two together."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import nn

from .lora_config import COMPUTE_DTYPES, PeftConfig


class Adapter(NamedTuple):
    """New parameters for one layer: A (dim, in), B (out, dim), and with DoRA the magnitude (out,)."""

    a: nn.Linear
    b: nn.Linear
    magnitude: nn.Parameter | None


def unfit(linear: nn.Module, config: PeftConfig) -> Exception | None:
    """Why `linear` cannot get the adapter of `config`, to be raised with the name in front; None if it can."""
    if not isinstance(linear, nn.Linear):
        return NotImplementedError(f"a {type(linear).__name__} is not an nn.Linear: only linear layers get an adapter")
    if hasattr(linear, "lora_A"):
        return ValueError("has an adapter already: patch a fresh model, or leave this layer out of the targets")
    if isinstance(linear.weight, nn.UninitializedParameter):
        return ValueError("is lazy and has no shape yet: run the model once before adapting it")
    if "forward" in vars(linear):
        return ValueError(
            "has a `forward` set on the module itself (as accelerate's hooks do), which would hide the adapter: adapt "
            "the model before that"
        )
    if not is_dense(linear):
        if config.lora_dtype is None:
            return ValueError(f'has a packed weight ({describe(linear.weight)}): say lora_dtype, as "bfloat16"')
        if config.use_dora:
            return ValueError(f"has a packed weight ({describe(linear.weight)}): DoRA needs the norms of a dense one")
    elif config.use_triton and linear.weight.dtype == torch.float64:
        return TypeError("is float64: the Triton kernels take float32, float16 and bfloat16; write use_triton=False")
    return None


def is_dense(linear: nn.Linear) -> bool:
    """Whether the weight is an ordinary (out, in) matrix of floating point numbers, not a quantised or packed one."""
    weight = linear.weight
    ordinary = type(weight) in (nn.Parameter, torch.Tensor) or is_distributed(weight)
    return (
        ordinary and weight.dtype in COMPUTE_DTYPES and tuple(weight.shape) == (linear.out_features, linear.in_features)
    )


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor. Imports nothing: where nobody imported DTensor, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`; of a DTensor that is a partial sum or norm on each device the whole one, on all of them."""
    if not is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(tensor, DTensor)
    return tensor.redistribute(placements=[Replicate() if each.is_partial() else each for each in tensor.placements])


def describe(weight: torch.Tensor) -> str:
    return f"{type(weight).__name__} of {weight.dtype}, shape {tuple(weight.shape)}"


@torch.inference_mode(False)  # parameters made in it could never be trained
@torch.no_grad()
def new_adapter(linear: nn.Linear, config: PeftConfig) -> Adapter:
    """The parameters, beside the weight: on its device, or split over its mesh as it is. Changes nothing else."""
    weight = linear.weight
    dtype = config.lora_dtype or weight.dtype
    assert isinstance(dtype, torch.dtype)
    a = _linear(linear.in_features, config.dim, weight.device, dtype)
    b = _linear(config.dim, linear.out_features, weight.device, dtype)
    init_factors(a.weight, b.weight, config.lora_A_init)
    if is_distributed(weight):
        # A is split where the weight's columns are, B where its rows are, so that neither has to be gathered.
        _split_as(weight, a, 1)
        _split_as(weight, b, 0)
    magnitude = None
    if config.use_dora:
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
        magnitude = nn.Parameter(summed(norms).to(dtype))
    return Adapter(a, b, magnitude)


@torch.no_grad()
def init_factors(a: torch.Tensor, b: torch.Tensor, method: str) -> None:
    """ "xavier": A normal with variance 2 / (in + dim); else U(-1/sqrt(in), 1/sqrt(in)). B zero."""
    if method == "xavier":
        nn.init.xavier_normal_(a)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)


def attach(linear: nn.Linear, adapter: Adapter, config: PeftConfig, name: str | None) -> None:
    """Freezes `linear` and gives it the adapter. Assignments only: it cannot fail half way."""
    linear.requires_grad_(False)
    linear.lora_A, linear.lora_B = adapter.a, adapter.b
    linear.register_parameter("lora_magnitude", adapter.magnitude)
    options = {
        "dim": config.dim,
        "alpha": config.alpha,
        "scale": config.alpha / config.dim,
        "dropout_p": config.dropout,
        "dropout_position": config.dropout_position,
        "use_dora": config.use_dora,
        "use_memory_efficient_lora": config.use_memory_efficient_lora,
        "layer_name": name,
        "base_is_plain": type(linear).forward is nn.Linear.forward and is_dense(linear),
    }
    vars(linear).update(options)


def _linear(in_features: int, out_features: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    # On "meta" first, because nn.Linear draws numbers that nobody would use.
    made = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
    made.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    return made


def _split_as(weight: torch.Tensor, factor: nn.Linear, dim: int) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    assert isinstance(weight, DTensor)
    placements = [each if each.is_shard(dim) else Replicate() for each in weight.placements]
    factor.weight = nn.Parameter(distribute_tensor(factor.weight.data, weight.device_mesh, placements))
