"""The layers that `torch_lora.py` times: ours, other libraries', and the formulas in plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_torch import triton_product
from lora_torch.lora import patch_linear_module

ALPHA_PER_RANK = 2.0
NEMO = "NeMo Automodel"
# As "x @ A kept", but with torch's products alone where `triton_product.product` has a kernel.
TORCH_TAIL = "TritonLinearLoRA, tail by torch"


class Eager(nn.Module):
    """What PEFT computes: two thin products, a scale, an addition, each a kernel of its own."""

    def __init__(self, linear: nn.Linear, rank: int, rate: float):
        super().__init__()
        self.base, self.rate = linear, rate
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device="cuda", dtype=linear.weight.dtype)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device="cuda", dtype=linear.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(F.dropout(x, self.rate))) * ALPHA_PER_RANK


class Addmm(torch.autograd.Function):
    """The library's products alone, those of full size added into their output."""

    @staticmethod
    def forward(ctx, x, w, a, b):
        h = F.linear(x, a) * ALPHA_PER_RANK
        ctx.save_for_backward(x, w, a, b, h)
        return F.linear(x, w).addmm_(h, b.T)

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b, h = ctx.saved_tensors
        g = (dy @ b) * ALPHA_PER_RANK
        return (dy @ w).addmm_(g, a), None, g.T @ x, dy.T @ h


class Plain(nn.Module):
    """The layer of an autograd function of `x, w, a, b`."""

    def __init__(self, function: Any, linear: nn.Linear, rank: int):
        super().__init__()
        self.function, self.base = function, linear
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device="cuda", dtype=linear.weight.dtype)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device="cuda", dtype=linear.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x, self.base.weight, self.lora_A.weight, self.lora_B.weight)


def by_peft(linear: nn.Linear, rank: int, rate: float) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, lora_dropout=rate, target_modules=["0"])  # pyright: ignore
    return peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)  # pyright: ignore


def by_nemo(linear: nn.Linear, rank: int, rate: float) -> nn.Module:
    from nemo_automodel.components._peft import lora  # pyright: ignore

    alpha = ALPHA_PER_RANK * rank
    return lora.patch_linear_module(linear, rank, alpha, dropout=rate, dropout_position="pre", use_triton=True)


def nemo_kernels() -> list[Any]:
    """Its kernels, each with a list of tiles to try."""
    from nemo_automodel.components._peft import lora_kernel  # pyright: ignore

    return [lora_kernel.lora_forward_kernel, lora_kernel.lora_da_dx_kernel, lora_kernel.lora_db_kernel]


def ours(linear: nn.Linear, rank: int, rate: float, **options: Any) -> nn.Module:
    return patch_linear_module(linear, rank, ALPHA_PER_RANK * rank, rate, "pre", **options)


@contextlib.contextmanager
def torch_tail() -> Iterator[None]:
    ours, triton_product.ready = triton_product.ready, lambda *_: None  # nothing is planned
    try:
        yield
    finally:
        triton_product.ready = ours


MAKERS: dict[str, Callable[[nn.Linear, int, float], nn.Module]] = {
    "peft": by_peft,
    "eager formula": Eager,
    "torch.compile": lambda linear, r, rate: torch.compile(Eager(linear, r, rate)),  # pyright: ignore
    "addmm function": lambda linear, r, rate: Plain(Addmm, linear, r),
    NEMO: by_nemo,
    "LinearLoRA": lambda linear, r, rate: ours(linear, r, rate, use_triton=False),
    "TritonLinearLoRA": ours,
    "TritonLinearLoRA, x @ A kept": lambda linear, r, rate: ours(linear, r, rate, use_memory_efficient_lora=False),
    TORCH_TAIL: lambda linear, r, rate: ours(linear, r, rate, use_memory_efficient_lora=False),
}
SETTINGS = {TORCH_TAIL: torch_tail}
OTHERS = ("peft", NEMO)  # left out with a word where they fail
WITHOUT_DROPOUT = ("addmm function", *SETTINGS)  # it would need a stored mask; dropout in a product is nobody's choice
