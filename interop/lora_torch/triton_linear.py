"""A linear layer and its adapter on the Triton kernels, as autograd functions.

Letters, as in the kernel files:
    M tokens    K input features    N output features    R rank

Tensors lie as PyTorch stores them: `w` (N, K), `a` (R, K), `b` (N, R).

    forward     h = s * drop(x) @ a.T        y = x @ w.T + h @ b.T + bias
    backward    g = s * dy @ b               dx = dy @ w + drop(g @ a)      da = g.T @ drop(x)     db = dy.T @ h

What is dropped here is `x` ("pre"). With "post" it is the low-rank result: `drop` then stands around `h @ b.T`, and
around `dy` in `g` and in `db`. No mask is kept: four words on the device are, and the kernels ask them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import triton_launch as launch
from . import triton_ops as ops
from .lora_autograd import check_branch, compute_dtype, rows, unflattened
from .lora_making import is_distributed


def require(where: str, *tensors: torch.Tensor) -> None:
    """Raises, with `where` in front, if the kernels cannot run on these tensors' device or kind.

    `RuntimeError` for a device without CUDA and no interpreter; `NotImplementedError` for a DTensor.
    """
    if any(is_distributed(tensor) for tensor in tensors):
        raise NotImplementedError(
            f"{where}the Triton kernels take the tensors of one device, not a DTensor: write use_triton=False for "
            "models that are split over a mesh"
        )
    device = tensors[0].device
    # While a graph is made there is no asking; the launch itself refuses then, without the name.
    if device.type in ("cuda", "meta") or torch.compiler.is_compiling():
        return
    if not launch.interpreting():
        raise RuntimeError(
            f"{where}use_triton=True needs a CUDA GPU, and `x` is on {device}. Move model and data there, write "
            "use_triton=False, or set TRITON_INTERPRET=1 before the first import of triton to run the kernels slowly "
            "on the CPU"
        )


class LoRATritonFunction(torch.autograd.Function):
    """`scale * (x @ lora_A.T) @ lora_B.T`, plus `res` if it is given: the low-rank branch alone.

    `apply(x, lora_A, lora_B, scale, dtype)` or `apply(x, lora_A, lora_B, scale, dtype, res)`: (..., K), (R, K),
    (N, R), and `res` (..., N); the result is of `dtype`, in which everything is computed. Kept for the backward pass:
    `x`, `lora_A` and `lora_B`. The passes over `x` and `dy` are Triton kernels, the products that write a tensor of
    their size are the library's, which adds `res` on the way.

    **Raises:** `ValueError` for shapes that do not belong together, and what `triton_launch.check` raises.
    """

    @staticmethod
    def forward(
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scale: float,
        dtype: torch.dtype,
        res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype={dtype!r} is no torch.dtype")
        check_branch(x, lora_A, lora_B, res)
        b = lora_B.to(dtype)
        h = ops.down(rows(x).to(dtype), lora_A.to(dtype).T, scale)
        y = h @ b.T if res is None else torch.addmm(rows(res).to(dtype), h, b.T)
        return unflattened(y, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, lora_A, lora_B, ctx.scale, ctx.dtype, *res = inputs
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.res_dtype = res[0].dtype if res and res[0] is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        (d_y,) = grad_outputs
        x, lora_A, lora_B = ctx.saved_tensors
        a, b = lora_A.to(ctx.dtype), lora_B.to(ctx.dtype)
        flat, d_flat = rows(x).to(ctx.dtype), rows(d_y).to(ctx.dtype)
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        dx = da = db = None
        if wants_x or wants_a:
            g = ops.down(d_flat, b, ctx.scale)
            dx = (g @ a).to(x.dtype).reshape(x.shape) if wants_x else None
            da = ops.outer(g, flat, dtype=lora_A.dtype) if wants_a else None
        if wants_b:
            h = ops.down(flat, a.T, ctx.scale)
            db = ops.outer(h, d_flat, dtype=lora_B.dtype, transposed=True)
        # Autograd allows a None more than there were inputs.
        return dx, da, db, None, None, None if ctx.res_dtype is None else d_y.to(ctx.res_dtype)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    rate: float = 0.0,
    *,
    post: bool = True,
    keep: bool = False,
) -> torch.Tensor:
    """`x @ weight.T + bias + scale * (x @ lora_A.T) @ lora_B.T`: (..., K), (N, K), (N,), (R, K), (N, R) -> (..., N).

    `weight` and `bias` get no gradient. `rate`: dropout of the low-rank result (`post`) or of its input; the mask
    follows torch's generator of the device. `keep`: keep `h` (M * R elements) for the backward pass, instead of
    computing it again. Factors are cast to the dtype of `x`; under autocast everything is.

    **Raises:** what `triton_launch.check` raises.
    """
    dtype = compute_dtype(x)
    words = _words(x.device) if rate else None
    if dtype != x.dtype:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    return LoRALinearFunction.apply(x, weight, bias, lora_A, lora_B, scale, rate, words, post, keep)


def _words(device: torch.device) -> torch.Tensor:
    """Two random words of seed and the place of the first element, as `triton_launch.Drop` wants them."""
    words = torch.randint(-(2**31), 2**31, (4,), dtype=torch.int32, device=device)
    words[2:] = 0
    return words


class LoRALinearFunction(torch.autograd.Function):
    """See `lora_linear`."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scale, rate, words, post, keep):
        y, h = forward_rows(rows(x), weight, bias, a, b, scale, rate, words, post)
        ctx.save_for_backward(x, weight, a, b, words, h if keep else None)
        ctx.rest = scale, rate, post
        return unflattened(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        x, weight, a, b, words, h = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wants = (needs[0], needs[3], needs[4])
        scale, rate, post = ctx.rest
        dy = rows(grad_outputs[0])
        dx, da, db = backward_rows(dy, rows(x), weight, a, b, scale, rate, post, words, h, wants)
        dx = None if dx is None else dx.reshape(x.shape)
        return dx, None, None, da, db, None, None, None, None, None


def forward_rows(x, w, bias, a, b, scale: float, rate: float, words, post: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`y` (M, N) and `h` (M, R)."""
    before, after = (None, words) if post else (words, None)
    h = ops.down(x, a.T, scale, rate, before)
    return ops.product(x, w.T, h, b.T, bias, rate, after), h


def backward_rows(
    dy, x, w, a, b, scale: float, rate: float, post: bool, words, h, wants: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of `x`, `a` and `b`, each if it is wanted."""
    before, after = (None, words) if post else (words, None)
    dx = da = db = None
    if wants[0] or wants[1]:
        g = ops.down(dy, b, scale, rate, after)
        if wants[0]:
            dx = ops.product(dy, w, g, a, None, rate, before)
        if wants[1]:
            da = ops.outer(g, x, rate, before, dtype=a.dtype)
    if wants[2]:
        if h is None:
            h = ops.down(x, a.T, scale, rate, before)
        db = ops.outer(h, dy, rate, after, dtype=b.dtype, transposed=True)
    return dx, da, db
