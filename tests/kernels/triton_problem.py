"""Random operands for the Triton kernels, their float64 products, and the dropout mask by its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax import reference
from tests.kernels.problems import drawn

if TYPE_CHECKING:
    import torch

SEED = (0xDEADBEEF, 0x12345678)
SCALE = 0.625


def operands(dtype: str, m: int, k: int, n: int, r: int) -> dict[str, torch.Tensor]:
    """Weights lie as PyTorch stores them. `h` and `g` are drawn, so that each kernel is judged by itself."""
    import torch

    generator = torch.Generator().manual_seed(m * k + n * r)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * std).to(getattr(torch, dtype))

    return {
        "x": normal(m, k),
        "w": normal(n, k, std=k**-0.5).T,
        "a": normal(r, k, std=k**-0.5).T,
        "b": normal(n, r).T,
        "dy": normal(m, n),
        "h": normal(m, r),
        "g": normal(m, r),
        "bias": normal(n),
    }


def exact(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def mask(m: int, k: int, rate: float, *, row: int = 0, column: int = 0, seed: tuple[int, int] = SEED) -> np.ndarray:
    """0 or 1 / (1 - rate), from the formula in the documentation."""
    threshold = round(rate * 65536)
    return (drawn((m, k), seed, (row, column)) >= threshold) * (65536 / (65536 - threshold))


def assert_close(got: torch.Tensor, product: Any, tensors: dict[str, torch.Tensor], terms: int, wrong: Any) -> None:
    """`got` equals `product(exact operands)` to rounding, and `wrong(exact operands)` would not have passed.

    The bound's magnitude is `product` of the operands' absolute values.
    """
    v = exact(tensors)
    want, magnitude = product(v), product({name: abs(value) for name, value in v.items()})
    dtype = str(got.dtype).removeprefix("torch.")
    bound = reference.tolerance(dtype, terms) * magnitude
    assert reference.excess(got.double().numpy(), want, bound) <= 1
    assert reference.excess(wrong(v), want, bound) > 1
