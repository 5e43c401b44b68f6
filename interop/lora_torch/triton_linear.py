"""A linear layer and its adapter on the Triton kernels, as autograd functions.

Letters, as in the kernel files:
    M tokens    K input features    N output features    R rank

Tensors lie as PyTorch stores them: `w` (N, K), `a` (R, K), `b` (N, R).

    forward     h = s * drop(x) @ a.T        y = x @ w.T + h @ b.T + bias
    backward    g = s * dy @ b               dx = dy @ w + drop(g @ a)      da = g.T @ drop(x)     db = dy.T @ h

What is dropped here is `x` ("pre"). With "post" it is the low-rank result: `drop` then stands around `h @ b.T`, and
around `dy` in `g` and in `db`. No mask is kept: four words on the device are, and the kernels ask them again.

Where nothing is dropped, `h` and `g` come with the product of full size (`triton_product.adapted`), and da and db are
torch's own products: they read `x` and `dy` as fast as the kernels, and one call of C++ is handed to the GPU in a
fraction of the time that Python takes for a kernel and for the sum of its parts. With dropout, which torch has no
product for, the thin passes are kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from . import triton_launch as launch
from . import triton_ops as ops
from .lora_autograd import as_they_are, changeable, check_branch, compute_dtype, refuses_twice, rows, unflattened
from .lora_making import is_distributed


def require(layer: Any, *tensors: torch.Tensor) -> None:
    """Raises, with `layer.where` in front, if the kernels cannot run on these tensors' device or kind.

    `RuntimeError` for a device without CUDA and no interpreter, `TypeError` for a dtype, `NotImplementedError` for a
    DTensor.
    """
    for tensor in tensors:
        if is_distributed(tensor):
            raise NotImplementedError(
                f"{layer.where}the Triton kernels take the tensors of one device, not a DTensor: write "
                "use_triton=False for models that are split over a mesh"
            )
    first = tensors[0]
    # While a graph is made there is no asking; the launch itself refuses then, without the name.
    if first.is_meta or torch.compiler.is_compiling():
        return
    if first.element_size() > 4 or not first.is_floating_point():  # what autocast leaves as it is
        launch.check_dtype(first, f"{layer.where}`x`")
    if not first.is_cuda and not launch.interpreting():
        raise RuntimeError(
            f"{layer.where}use_triton=True needs a CUDA GPU, and `x` is on {first.device}. Move model and data there, "
            "write use_triton=False, or set TRITON_INTERPRET=1 before the first import of triton to run the kernels "
            "slowly on the CPU"
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
        with as_they_are(h):
            y = h @ b.T if res is None else torch.addmm(rows(res).to(dtype), h, b.T)
        return unflattened(y, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, lora_A, lora_B, ctx.scale, ctx.dtype, *res = inputs
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.res_dtype = res[0].dtype if res and res[0] is not None else None
        ctx.inputs = len(inputs)

    @staticmethod
    @refuses_twice
    def backward(ctx: Any, d_y: torch.Tensor):
        x, lora_A, lora_B = ctx.saved_tensors
        a, b = lora_A.to(ctx.dtype), lora_B.to(ctx.dtype)
        flat, d_flat = rows(x).to(ctx.dtype), rows(d_y).to(ctx.dtype)
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        dx = da = db = None
        if wants_x or wants_a:
            g = ops.down(d_flat, b, ctx.scale)
            with as_they_are(g):
                dx = (g @ a).to(x.dtype).reshape(x.shape) if wants_x else None
            da = ops.outer(g, flat, dtype=lora_A.dtype) if wants_a else None
        if wants_b:
            h = ops.down(flat, a.T, ctx.scale)
            db = ops.outer(h, d_flat, dtype=lora_B.dtype, transposed=True)
        d_res = None if ctx.res_dtype is None else d_y.to(ctx.res_dtype)
        return (dx, da, db, None, None, d_res)[: ctx.inputs]


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
    # Of all devices at once, in a fraction of the time: of those that there are kernels for.
    autocast = torch._C._is_any_autocast_enabled()
    dtype = compute_dtype(x) if autocast else x.dtype
    words = _words(x.device) if rate else None
    if autocast:
        # Each by itself: `x` may have autocast's dtype already, from the layer before.
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # Not to be asked is faster for a tensor than to find that it has the dtype.
    if lora_A.dtype != dtype:
        lora_A = lora_A.to(dtype)
    if lora_B.dtype != dtype:
        lora_B = lora_B.to(dtype)
    return LoRALinearFunction.apply(x, weight, bias, lora_A, lora_B, words, (scale, rate, post, keep))


def _words(device: torch.device) -> torch.Tensor:
    """Two random words of seed and the place of the first element, as `triton_launch.Drop` wants them."""
    words = torch.randint(-(2**31), 2**31, (4,), dtype=torch.int32, device=device)
    words.narrow(0, 2, 2).zero_()
    return words


class LoRALinearFunction(torch.autograd.Function):
    """See `lora_linear`."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, words, how):
        scale, rate, post, keep = ctx.how = how
        y, h = forward_rows(rows(x), weight, bias, a, b, scale, rate, words, post)
        ctx.save_for_backward(x, weight, a, b, words, h if keep else None)
        if x.ndim == 2 or torch.compiler.is_compiling():
            return unflattened(y, x)
        return y.resize_((*x.shape[:-1], y.shape[1]))  # no view either, and a fraction of the time

    @staticmethod
    @refuses_twice
    def backward(ctx: Any, dy: torch.Tensor):
        with as_they_are(dy):
            return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: torch.Tensor):
    x, weight, a, b, words, h = ctx.saved_tensors
    wants_x, _, _, *wants_factors, _, _ = ctx.needs_input_grad
    scale, rate, post, _ = ctx.how
    wants = (wants_x, *wants_factors)
    dx, da, db = backward_rows(rows(dy), rows(x), weight, a, b, scale, rate, post, words, h, wants)
    if dx is not None and x.ndim != 2:
        dx = dx.view(x.shape)
    return dx, None, None, da, db, None, None


def forward_rows(x, w, bias, a, b, scale: float, rate: float, words, post: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`y` (M, N) and `h` (M, R)."""
    if words is None:
        return ops.adapted(x, w, a, b, bias, scale, transposed=True)
    before, after = (None, words) if post else (words, None)
    h = _down(x, a.T, scale, rate, before)
    return ops.product(x, w, h, b, bias, rate, after, transposed=True), h


def backward_rows(
    dy, x, w, a, b, scale: float, rate: float, post: bool, words, h, wants: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of `x`, `a` and `b`, each if it is wanted.

    What reads `dy` comes together: of small layers the L2 cache still holds it then.
    """
    before, after = (None, words) if post else (words, None)
    dx = da = db = None
    if wants[2]:
        if h is None:
            h = _down(x, a.T, scale, rate, before)
        db = dy.T.mm(h) if after is None else ops.outer(h, dy, rate, after, dtype=b.dtype, transposed=True)
    if words is None and wants[0]:
        dx, g = ops.adapted(dy, w, b, a, None, scale)
        da = g.T.mm(x) if wants[1] else None
    elif wants[0] or wants[1]:
        g = _down(dy, b, scale, rate, after)
        if wants[1]:
            da = g.T.mm(x) if before is None else ops.outer(g, x, rate, before, dtype=a.dtype)
        if wants[0]:
            dx = ops.product(dy, w, g, a, None, rate, before)
    return dx, da, db


def _down(x: torch.Tensor, a: torch.Tensor, scale: float, rate: float, words: torch.Tensor | None) -> torch.Tensor:
    """`scale * drop(x) @ a`, rounded once: (M, K), (K, R) -> (M, R)."""
    if words is not None:
        return ops.down(x, a, scale, rate, words)
    return changeable(x, a, scale=scale)
