"""`QATLoRALinear`: the base sees fake-quantised numbers while training, the adapter the exact ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .lora import LoRALinear
from .nf4 import import_torchao

_QAT = "torchao.quantization.qat"


class QATLoRALinear(LoRALinear):
    """`y = q_act(x) q_w(W)^T + (alpha / rank) * B(A(dropout(x)))`, without a bias and without NF4.

    **Arguments:** as `LoRALinear`, and `activation_qat_config`, `weight_qat_config`: torchao's `FakeQuantizeConfig` or
    the `IntxFakeQuantizeConfig` that replaces it; None leaves that side as it is.

    **Raises:** `ValueError` if the weight's `group_size` does not divide `in_dim`; `TypeError` for another
    configuration; `ImportError` for a configuration without torchao.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        activation_qat_config: Any = None,
        weight_qat_config: Any = None,
    ):
        _check_config("activation_qat_config", activation_qat_config)
        _check_config("weight_qat_config", weight_qat_config)
        _check_groups(weight_qat_config, in_dim)
        super().__init__(in_dim, out_dim, rank, alpha, dropout)
        self.activation_fake_quantizer = _quantizer(activation_qat_config)
        self.weight_fake_quantizer = _quantizer(weight_qat_config)

    @classmethod
    def from_lora_linear(
        cls, lora_linear: LoRALinear, activation_qat_config: Any = None, weight_qat_config: Any = None
    ) -> QATLoRALinear:
        """The same layer with fake quantisation, around the very parameters of `lora_linear`.

        Parameters on the meta device stay there.

        **Raises:** `ValueError` for a layer with a bias or an NF4 base, `TypeError` for another kind of layer; as the
        constructor.
        """
        if not isinstance(lora_linear, LoRALinear):
            raise TypeError(f"`lora_linear` must be a LoRALinear, got {type(lora_linear).__name__}")
        if lora_linear.bias is not None:
            raise ValueError("Bias is not supported in QAT + LoRA yet: use a layer with `use_bias=False`")
        if lora_linear._quantize_base:
            raise ValueError("quantize_base is not compatible with QAT + LoRA: use a layer with a dense base")
        _check_config("activation_qat_config", activation_qat_config)
        _check_config("weight_qat_config", weight_qat_config)
        _check_groups(weight_qat_config, lora_linear.in_dim)
        rate = lora_linear.dropout.p if isinstance(lora_linear.dropout, nn.Dropout) else 0.0
        with torch.device("meta"):  # what is shared below would be allocated and drawn for nothing
            out = cls(lora_linear.in_dim, lora_linear.out_dim, lora_linear.rank, lora_linear.alpha, rate)
        out.activation_fake_quantizer = _quantizer(activation_qat_config)
        out.weight_fake_quantizer = _quantizer(weight_qat_config)
        out.weight = lora_linear.weight
        out.lora_a.weight, out.lora_b.weight = lora_linear.lora_a.weight, lora_linear.lora_b.weight
        out.disabled = lora_linear.disabled
        return out.train(lora_linear.training)

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.activation_fake_quantizer(x), self.weight_fake_quantizer(self.weight))


def _quantizer(config: Any) -> nn.Module:
    if config is None:
        return nn.Identity()
    return import_torchao(_QAT, "fake quantisation").FakeQuantizerBase.from_config(config)


def _check_config(name: str, config: Any) -> None:
    if config is None:
        return
    if not isinstance(config, import_torchao(_QAT, f"`{name}`").IntxFakeQuantizeConfig):
        raise TypeError(f"`{name}` must be torchao's FakeQuantizeConfig, got {type(config).__name__}")


def _check_groups(config: Any, in_dim: int) -> None:
    # `config.group_size` raises where the granularity has none.
    size = getattr(getattr(config, "granularity", None), "group_size", 0)
    if size > 0 and in_dim % size:
        raise ValueError(f"in_dim ({in_dim}) must be divisible by group_size ({size}); choose one that divides it")
