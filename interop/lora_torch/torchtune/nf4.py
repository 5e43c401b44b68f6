"""NF4 base weights, stored by torchao, which is imported only where one is made.

A weight is a `torchao` `NF4Tensor`: 4 bits an element, an 8-bit scaler for each block of 64, a factor for each 256
scalers. It is dequantised whenever it is used and never gets a gradient; the input does.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import torch.nn.functional as F

# torchao keeps the tensor class where it is public; 0.18 moved it.
_HOMES = ("torchao.quantization", "torchao.dtypes")


def to_nf4(weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """`weight` (at most 2-D) as an `NF4Tensor`; `kwargs` are torchao's `block_size` and `scaler_block_size`.

    **Raises:** `ImportError` without torchao; `TypeError` for other keywords; `ValueError` for a number of elements
    that the blocks do not divide (with torchao's defaults, any that is no multiple of 64 * 256 = 16384).
    """
    homes = [import_torchao(home, "an NF4 base") for home in _HOMES]
    quantise = next(home.to_nf4 for home in homes if hasattr(home, "to_nf4"))
    try:
        return quantise(weight, **kwargs)
    except AssertionError as error:  # torchao asserts what a caller gets wrong
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} cannot be stored as NF4: {error}. The number of its elements "
            "must be a multiple of block_size * scaler_block_size; pass smaller ones"
        ) from error


def is_nf4(tensor: Any) -> bool:
    """Whether a tensor, or the data of a parameter, is an `NF4Tensor`. Imports nothing."""
    kinds = [getattr(sys.modules.get(home), "NF4Tensor", None) for home in _HOMES]
    return any(kind is not None and isinstance(tensor, kind) for kind in kinds)


def dequantised(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A dense tensor: of the dtype that was quantised (or `dtype`) for NF4, else `tensor` itself (as `dtype`)."""
    return tensor if dtype is None and not is_nf4(tensor) else tensor.to(dtype or tensor.dtype)


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` for a dense or an NF4 weight (out, in); x is (..., in)."""
    if not is_nf4(weight):
        return F.linear(x, weight, bias)
    out = F.linear(x, weight)  # torchao's own function: the backward pass dequantises again instead of keeping it
    return out if bias is None else out + bias


def reparametrize_as_dtype_state_dict_post_hook(
    model: torch.nn.Module,
    state_dict: dict[str, Any],
    *args: Any,
    dtype: torch.dtype = torch.bfloat16,
    offload_to_cpu: bool = True,
    **kwargs: Any,
) -> None:
    """Replaces NF4 tensors in a state dict by dense ones, in place.

    Register it with `model._register_state_dict_hook`, which passes more arguments than are needed here. Files of
    safetensors cannot hold NF4 tensors, so a quantised model needs it there.
    """
    for name, value in state_dict.items():
        if is_nf4(value):
            dense = dequantised(value, dtype)
            state_dict[name] = dense.cpu() if offload_to_cpu else dense


def import_torchao(module: str, what: str) -> Any:
    """A module of torchao. **Raises** `ImportError`, which says that `what` needs it, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs torchao: `pip install torchao`, or the extra, `pip install 'lora-jax[torchao]'`"
        ) from error
