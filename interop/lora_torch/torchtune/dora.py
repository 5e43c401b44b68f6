"""`DoRALinear`: the direction of the weight is adapted by low-rank factors, its length per output by a magnitude."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import base_parameters, check_arguments, dropout_of, factors, gain, low_rank, reset_factors
from .nf4 import dequantised, frozen_linear


class DoRALinear(nn.Module):
    """`y = g * (x W^T + bias) + g * scaling * B(A(dropout(x)))` with `g = magnitude / ||W + scaling * B A||_row`.

    The norm counts as a constant in the backward pass, and where it is 0, g is 1. The frozen part sees `x` without
    dropout, and the **bias is scaled too**: PEFT and NeMo leave it out of the scaling, so a DoRA layer with a bias has
    no equal there.

    Parameters: those of `LoRALinear` and `magnitude` (out_dim,), which starts as the row norms of the weight that is
    there. Call `initialize_dora_magnitude()` after loading another base. Attributes: `scaling`, alpha / rank.

    **Arguments** and **Raises:** as `LoRALinear`.

    **Source:** Liu et al., arXiv:2402.09353, equation 5 and section 4.3 (the constant norm).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_bias: bool = False,
        quantize_base: bool = False,
        **quantization_kwargs: Any,
    ):
        super().__init__()
        check_arguments(in_dim, out_dim, rank, alpha, dropout, quantize_base, quantization_kwargs)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.scaling = alpha / rank
        self.use_bias = use_bias
        self._quantize_base = quantize_base
        self.disabled = False
        self.weight, bias = base_parameters(in_dim, out_dim, use_bias, quantize_base, quantization_kwargs)
        self.register_parameter("bias", bias)
        self.dropout = dropout_of(dropout)
        self.lora_a, self.lora_b = factors(in_dim, out_dim, rank)
        self.magnitude = nn.Parameter(torch.empty(out_dim))
        self.initialize_parameters()
        if not self._is_meta():
            self.initialize_dora_magnitude()

    def initialize_parameters(self) -> None:
        """Draws A anew and sets B to zero; the base and the magnitude keep their values."""
        reset_factors(self.lora_a, self.lora_b)

    @torch.no_grad()
    def initialize_dora_magnitude(self) -> None:
        """Sets the magnitude to the row norms of `W + scaling * B A`, so that the layer computes what LoRA would.

        To be called once base and factors have their values.

        **Raises:** `RuntimeError` if one of them is still on the meta device; nothing is changed then.
        """
        if self._is_meta():
            raise RuntimeError(
                "Cannot initialize DoRA magnitude if base or LoRA parameters are still on meta device. Load the base "
                "with `load_state_dict(..., assign=True)`, and give the factors memory with `to_empty(device=...)` and "
                "values with `initialize_parameters()`"
            )
        self.magnitude.copy_(self._row_norms(self.lora_a.weight.dtype))

    def adapter_params(self) -> list[str]:
        """Names of the parameters that the adapter trains."""
        return ["lora_a.weight", "lora_b.weight", "magnitude"]

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> DoRALinear:
        """Gives factors and magnitude, and not the base, uninitialised memory on `device`; returns the module."""
        self.lora_a.to_empty(device=device, recurse=recurse)
        self.lora_b.to_empty(device=device, recurse=recurse)
        magnitude = torch.empty_like(self.magnitude, device=device)
        # Swapped, not replaced: an optimizer that holds the parameter keeps holding it.
        torch.utils.swap_tensors(self.magnitude, nn.Parameter(magnitude, self.magnitude.requires_grad))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_dim) to (..., out_dim), in the base's dtype."""
        base = frozen_linear(x, self.weight, self.bias)
        if self.disabled:
            return base
        update = self.scaling * low_rank(self.dropout(x), self.lora_a, self.lora_b)
        with torch.no_grad():
            norms = self._row_norms(x.dtype)
        g = gain(self.magnitude, norms)
        return (base + (g - 1) * base + g * update).to(base.dtype)

    def _row_norms(self, dtype: torch.dtype) -> torch.Tensor:
        """Norms of the rows of `W + scaling * B A` (out_dim,), formed in `dtype`."""
        product = self.lora_b.weight @ self.lora_a.weight
        return torch.linalg.vector_norm(dequantised(self.weight, dtype) + self.scaling * product, dim=1).to(dtype)

    def _is_meta(self) -> bool:
        return self.weight.is_meta or self.lora_a.weight.is_meta or self.lora_b.weight.is_meta

    def extra_repr(self) -> str:
        return (
            f"in_dim={self.in_dim}, out_dim={self.out_dim}, scaling={self.scaling}, use_bias={self.use_bias}, "
            f"quantize_base={self._quantize_base}"
        )
