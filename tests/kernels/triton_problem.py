"""Random operands for the Triton kernels, their float64 products, and the dropout mask by its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax import reference

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
    """0 or 1 / (1 - rate) by the definition in `triton_dropout`, in unbounded integers."""

    def fmix(v: Any) -> Any:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            v = ((v ^ (v >> shift)) * factor) % 2**32
        return v ^ (v >> 16)

    i = np.arange(row, row + m).astype(object)[:, None]
    j = np.arange(column, column + k).astype(object)[None]
    key, v = (i * 0x9E3779B9 + seed[1]) % 2**32, (((j >> 7 << 6) | (j & 63)) * 0x85EBCA6B + seed[0]) % 2**32
    word = ((fmix(key) | 1) * ((v ^ (v >> 16)) * 0xC2B2AE35 % 2**32 | 1) + key) % 2**32
    factor = 0xC2B2AE35 + (j >> 6 & 1) * (0x27D4EB2F - 0xC2B2AE35)
    bits = ((word ^ (word >> 16)) * factor % 2**32 >> 16) ^ 0x8000
    threshold = round(rate * 65536)
    return (bits >= threshold).astype(np.float64) * (65536 / (65536 - threshold))


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
