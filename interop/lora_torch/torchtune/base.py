"""What the adapted linear layers of this package share: their arguments, and the frozen weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .nf4 import to_nf4


def check_arguments(
    in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float, quantize_base: bool, kwargs: Mapping[str, Any]
) -> None:
    """**Raises** `ValueError` for a size below one, an alpha that is not finite, a dropout outside of [0, 1], or
    arguments of a quantisation that does not take place."""
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"`{name}` must be a number, got {value!r}")
    for name, value in (("in_dim", in_dim), ("out_dim", out_dim), ("rank", rank)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive whole number, got {value!r}")
    if not math.isfinite(alpha):
        raise ValueError(f"`alpha` must be finite, got {alpha!r}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"`dropout` is a probability, got {dropout!r}")
    if not quantize_base and any(kwargs.values()):
        raise ValueError(
            f"``quantize_base`` is False, but received the following quantization arguments: {dict(kwargs)}. Pass "
            "`quantize_base=True`, or leave them out"
        )


def base_parameters(
    in_dim: int, out_dim: int, use_bias: bool, quantize_base: bool, kwargs: Mapping[str, Any]
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight (out, in), dense or NF4, and bias (out,), drawn as `nn.Linear` draws them."""
    linear = nn.Linear(in_dim, out_dim, bias=use_bias)
    weight = to_nf4(linear.weight.detach(), **kwargs) if quantize_base else linear.weight.detach()
    return nn.Parameter(weight), linear.bias if use_bias else None


def dropout_of(rate: float) -> nn.Module:
    return nn.Dropout(rate) if rate > 0 else nn.Identity()


def factors(in_dim: int, out_dim: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """A (rank, in) and B (out, rank) as linear layers; `reset_factors` gives them their values."""
    return nn.Linear(in_dim, rank, bias=False), nn.Linear(rank, out_dim, bias=False)


def reset_factors(lora_a: nn.Linear, lora_b: nn.Linear) -> None:
    """A uniform within 1 / sqrt(in), B zero. **Source:** Hu et al., arXiv:2106.09685, section 4.1, for the zeros."""
    nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))
    nn.init.zeros_(lora_b.weight)


def low_rank(x: torch.Tensor, lora_a: nn.Linear, lora_b: nn.Linear) -> torch.Tensor:
    """`B(A(x))` in the dtype of the factors, which may be wider than that of x."""
    return lora_b(lora_a(x.to(lora_a.weight.dtype)))


def gain(magnitude: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """`magnitude / norms`, (out,); 1 for a row of zeros, which has no direction and would be 0 / 0."""
    return torch.where(norms == 0, 1.0, magnitude / norms.masked_fill(norms == 0, 1))
