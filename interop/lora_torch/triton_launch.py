"""Launches the Triton kernels of `lora_jax/kernels` on torch tensors: 2-D, of one dtype, contiguous or strided.

Letters, as in the kernel files:
    M tokens    K input features    N output features    R rank

A LoRA linear is four calls forward and backward, with `h` kept in between (M * R elements):

    h = down(x, a, scale, drop);   y = forward(x, w, h, b, bias)
    g = down(dy, b.T, scale);      dx = input_gradient(dy, w, g, a, drop)
    da = outer(g, x, drop).T;      db = outer(h, dy)

`w` is (K, N): pass `linear.weight.T`, a view. So are `a` (K, R), PyTorch's `lora_A.weight.T`, and `b` (R, N).
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_jax.kernels import triton_plans as plans
from lora_jax.kernels.triton_configs import GemmConfig, PassConfig
from lora_jax.kernels.triton_plans import Launch, Matrix

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Drop:
    """Dropout of `x`: its rate, and four int32 words on the device that `triton_dropout.kept` reads.

    Two words of seed, then the global row and the global column of the first element of `x`, for a shard of a larger
    array. On the device, so that a new seed needs neither a transfer nor a new CUDA graph.
    """

    rate: float
    words: torch.Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"dropout rate {self.rate} is not between 0 and 1")

    @classmethod
    def seeded(cls, rate: float, seed: tuple[int, int], device: Any, *, row: int = 0, column: int = 0) -> Drop:
        """`seed`: two words of 32 bits. `column` must be even: two neighbouring columns share a word."""
        import torch

        if column % 2:
            raise ValueError(f"column={column}: a shard of `x` must begin at an even column for dropout")
        signed = [(word + 2**31) % 2**32 - 2**31 for word in (*seed, row, column)]
        return cls(rate, torch.tensor(signed, dtype=torch.int32, device=device))

    @property
    def threshold(self) -> int:
        """An element is kept if its 16 bits are not below this."""
        return round(self.rate * plans.STEPS)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by: the inverse of the exact probability of being kept."""
        return plans.rescaling(self.threshold)


def down(
    x: torch.Tensor,
    a: torch.Tensor,
    scale: float = 1.0,
    drop: Drop | None = None,
    *,
    config: PassConfig | None = None,
) -> torch.Tensor:
    """`scale * drop(x) @ a`: (M, K), (K, R) -> (M, R) of `x.dtype`, contiguous. `g` is `down(dy, b.T, scale)`.

    Raises: ValueError for shapes, TypeError for dtypes, RuntimeError without a GPU (see `check`).
    """
    check({"x": x, "a": a}, [("x", 1, "a", 0)])
    out = x.new_empty(x.shape[0], a.shape[1])
    if x.shape[0] == 0:
        return out
    threshold = drop.threshold if drop else 0
    plan = plans.down(_seen(x), _seen(a), scale, threshold, sms(x.device.index), config=config)
    return _run(plan, out, x_ptr=x, a_ptr=a, seed_ptr=drop.words if drop else None)


def outer(
    t: torch.Tensor,
    v: torch.Tensor,
    drop: Drop | None = None,
    *,
    config: PassConfig | None = None,
) -> torch.Tensor:
    """`t.T @ drop(v)`: (M, R), (M, C) -> (R, C) in float32, contiguous. `da.T` is `outer(g, x, drop)`.

    Raises: as `down`.
    """
    check({"t": t, "v": v}, [("t", 0, "v", 0)])
    out = t.new_empty((t.shape[1], v.shape[1]), dtype=_float32())
    if t.shape[0] == 0:
        return out.zero_()
    threshold = drop.threshold if drop else 0
    plan = plans.outer(_seen(t), _seen(v), threshold, sms(v.device.index), config=config)
    return _run(plan, out, t_ptr=t, v_ptr=v, seed_ptr=drop.words if drop else None)


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """`x @ w + h @ b + bias`: (M, K), (K, N), (M, R), (R, N), (N,) -> (M, N) of `x.dtype`, rounded once.

    Raises: as `down`.
    """
    return _gemm(x, w, h, b, bias, None, config)


def input_gradient(
    dy: torch.Tensor,
    w: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    drop: Drop | None = None,
    *,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """`dy @ w.T + mask / (1 - rate) * (g @ a.T)`: (M, N), (K, N), (M, R), (K, R) -> (M, K) of `dy.dtype`.

    Raises: as `down`.
    """
    return _gemm(dy, w.T, g, a.T, None, drop, config)


def _gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    drop: Drop | None,
    config: GemmConfig | None,
) -> torch.Tensor:
    check(
        {"x": x, "w": w, "h": h, "b": b} | ({} if bias is None else {"bias": bias}),
        [("x", 1, "w", 0), ("x", 0, "h", 0), ("h", 1, "b", 0), ("w", 1, "b", 1)]
        + ([] if bias is None else [("w", 1, "bias", 0)]),
    )
    y = x.new_empty(x.shape[0], w.shape[1])
    if x.shape[0] == 0:
        return y
    plan = plans.gemm(
        *map(_seen, (x, w, h, b, y)), drop.threshold if drop else 0, sms(x.device.index),
        bias=bias is not None, config=config,
    )  # fmt: skip
    w = w.T if plan.blocks and plan.numbers["W_T"] else w
    return _run(plan, y, x_ptr=x, w_ptr=w, h_ptr=h, b_ptr=b, bias_ptr=bias, seed_ptr=drop.words if drop else None)


def _run(plan: Launch, out: torch.Tensor, **operands: torch.Tensor | None) -> torch.Tensor:
    """`operands` by the names of their pointers."""
    target = out if plan.parts == 1 else out.new_empty((plan.parts, *out.shape), dtype=_float32())
    pointers = operands | {plan.out: target}
    for name, block in plan.blocks.items():
        pointers[name] = _described(pointers[name], block)
    _kernel(plan.kernel)[(plan.programs,)](
        **pointers, **plan.numbers, num_warps=plan.warps, num_stages=plan.stages
    )  # fmt: skip
    return out if plan.parts == 1 else _run(plans.total(out.numel(), plan.parts), out, parts_ptr=target)


def check(tensors: dict[str, torch.Tensor], equal: list[tuple[str, int, str, int]]) -> None:
    """Raises unless the kernels can take these tensors; `equal` lists the dimensions that must agree.

    TypeError: dtypes that differ or are not float32, float16 or bfloat16. ValueError: ranks, sizes, devices.
    RuntimeError: no GPU and no interpreter, or bfloat16 under the interpreter, which multiplies it wrongly.
    """
    import torch

    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"`{name}` is {tensor.dtype} but `{first_name}` is {first.dtype}: cast one of them")
        if tensor.device != first.device:
            raise ValueError(f"`{name}` is on {tensor.device} but `{first_name}` is on {first.device}")
        if tensor.ndim != (1 if name == "bias" else 2):
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}: flatten it to two dimensions first")
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"`{first_name}` is {first.dtype}: the Triton kernels take float32, float16 and bfloat16")
    for left, i, right, j in equal:
        if tensors[left].shape[i] != tensors[right].shape[j]:
            shapes = {name: tuple(tensors[name].shape) for name in (left, right)}
            raise ValueError(f"dimension {i} of `{left}` and dimension {j} of `{right}` differ: {shapes}")
    if _interpreting():
        if first.dtype == torch.bfloat16:
            raise RuntimeError("TRITON_INTERPRET=1: Triton's interpreter multiplies bfloat16 wrongly; use float16")
    elif first.device.type != "cuda":
        raise RuntimeError(
            f"`{first_name}` is on {first.device}, and the Triton kernels need a CUDA GPU. Move the tensors there, or "
            "set TRITON_INTERPRET=1 before the first import of triton to run them slowly on the CPU."
        )


@functools.cache
def _kernel(name: str) -> Any:
    """`<name>_kernel` of `lora_jax/kernels/triton_<name>.py`, which imports triton."""
    try:
        return getattr(importlib.import_module(f"lora_jax.kernels.triton_{name}"), f"{name}_kernel")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError("the Triton kernels need triton: install `lora-jax[triton]`", name="triton") from None


@functools.cache
def _interpreting() -> bool:
    """Whether Triton runs kernels on the CPU. It decides when a kernel is imported, so the answer never changes."""
    return "Interpreted" in type(_kernel("sum")).__name__


@functools.cache
def sms(device: int | None) -> int:
    """Multiprocessors of a CUDA device; 4 stands in for them under the interpreter."""
    import torch

    return 4 if device is None else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_tma(device: int | None) -> bool:
    """Whether the device copies tiles by descriptor (Hopper and later); the interpreter does."""
    import torch

    return device is None or torch.cuda.get_device_capability(device)[0] >= 9


def _seen(tensor: torch.Tensor) -> Matrix:
    """Rows of a descriptor begin at multiples of 16 bytes, and so must the first."""
    (rows, columns), (row, column) = tensor.shape, tensor.stride()
    tma = tensor.data_ptr() % 16 == 0 and _has_tma(tensor.device.index)
    return Matrix((rows, columns), (row, column), tensor.element_size(), tma)


def _described(tensor: Any, block: tuple[int, int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def _float32() -> torch.dtype:
    import torch

    return torch.float32
