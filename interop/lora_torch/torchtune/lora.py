"""`LoRALinear`: a linear layer that holds its own frozen weight beside the factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import base_parameters, check_arguments, dropout_of, factors, low_rank, reset_factors
from .nf4 import frozen_linear


class LoRALinear(nn.Module):
    """`y = x W^T + bias + (alpha / rank) * B(A(dropout(x)))`.

    Parameters: `weight` (out_dim, in_dim), `bias` (out_dim,) or None, `lora_a.weight` (rank, in_dim), `lora_b.weight`
    (out_dim, rank). All start with `requires_grad=True`; `set_trainable_params` freezes the base.

    **Arguments:**

    - `in_dim`, `out_dim`, `rank`, `alpha`: as in the formula; `alpha` equal to `rank` is a scale of one.
    - `dropout`: probability, on the input of the low-rank branch while training.
    - `use_bias`: whether the base has a bias.
    - `quantize_base`: store `weight` as NF4 by torchao.
    - `quantization_kwargs`: torchao's `block_size` and `scaler_block_size`.

    **Raises:** `ValueError` for arguments of a quantisation without `quantize_base`, for sizes below one, and for a
    weight that the blocks of NF4 do not divide; `TypeError` for a quantisation argument that torchao lacks;
    `ImportError` for `quantize_base` without torchao.

    **Source:** Hu et al., arXiv:2106.09685, equation 3; Dettmers et al., arXiv:2305.14314, for the quantised base.
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
        self.rank, self.alpha = rank, alpha
        self.use_bias = use_bias
        self._quantize_base = quantize_base
        self.disabled = False
        self.merged = False
        self.weight, bias = base_parameters(in_dim, out_dim, use_bias, quantize_base, quantization_kwargs)
        self.register_parameter("bias", bias)
        self.dropout = dropout_of(dropout)
        self.lora_a, self.lora_b = factors(in_dim, out_dim, rank)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Draws A anew and sets B to zero; the base keeps its values."""
        reset_factors(self.lora_a, self.lora_b)

    def adapter_params(self) -> list[str]:
        """Names of the parameters that the adapter trains."""
        return ["lora_a.weight", "lora_b.weight"]

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> LoRALinear:
        """Gives the factors, and not the base, uninitialised memory on `device`; returns the module.

        For a module built on the meta device whose base arrives by `load_state_dict(..., assign=True)`.
        """
        self.lora_a.to_empty(device=device, recurse=recurse)
        self.lora_b.to_empty(device=device, recurse=recurse)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_dim) to (..., out_dim), in the base's dtype."""
        out = self._base(x)
        if self.disabled:
            return out
        update = (self.alpha / self.rank) * low_rank(self.dropout(x), self.lora_a, self.lora_b)
        return out + update.to(out.dtype)

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_dim={self.in_dim}, out_dim={self.out_dim}, rank={self.rank}, alpha={self.alpha}, "
            f"use_bias={self.use_bias}, quantize_base={self._quantize_base}"
        )
