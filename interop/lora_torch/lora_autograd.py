"""The low-rank branch as one autograd function on torch's own products: it keeps `x`, A and B, and not `x @ A`.

Letters, as in the kernel files:
    M tokens    K input features    N output features    R rank

The Triton counterpart is `triton_linear.LoRATritonFunction`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# Asked once: Dynamo cannot trace the question, and of other kinds `is_autocast_enabled` raises.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "privateuseone")
_WITH_AUTOCAST = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


def apply_memory_efficient_lora(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    use_triton_kernel: bool = False,
    res: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scale * (x @ lora_A.T) @ lora_B.T`, plus `res`: (..., K), (R, K), (N, R), (..., N) -> (..., N).

    The factors are cast to the dtype of `x` (under autocast: all to the dtype of autocast), and the result has the
    dtype of `res`, if there is one. Gradients come back in the dtype of what they belong to. The result is a tensor
    of its own: it can be changed in place, and `res` is left as it was.

    **Raises:** `ValueError` for shapes that do not belong together; with `use_triton_kernel`, what
    `triton_launch.check` raises.
    """
    check_branch(x, lora_A, lora_B, res)
    dtype = compute_dtype(x)
    out_dtype = dtype if res is None else res.dtype
    x, lora_A, lora_B = x.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
    if use_triton_kernel:
        from .triton_linear import LoRATritonFunction

        args = (x, lora_A, lora_B, scale, dtype)
        y = LoRATritonFunction.apply(*args) if res is None else LoRATritonFunction.apply(*args, res.to(dtype))
    else:
        y = LowRankFunction.apply(x, lora_A, lora_B, scale, None if res is None else res.to(dtype))
    return y.to(out_dtype)


class LowRankFunction(torch.autograd.Function):
    """`res + scale * (x @ a.T) @ b.T`: (..., K), (R, K), (N, R), of one dtype.

    Can be differentiated twice and mapped by `torch.func.vmap`, since it is made of torch's own operations.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, res: torch.Tensor | None):
        h = F.linear(rows(x), a) * scale
        y = h @ b.T if res is None else torch.addmm(rows(res), h, b.T)
        return unflattened(y, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, a, b, ctx.scale, _ = inputs
        ctx.save_for_backward(x, a, b)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        (dy,) = grad_outputs
        x, a, b = ctx.saved_tensors
        wants_x, wants_a, wants_b, _, wants_res = ctx.needs_input_grad
        dx = da = db = None
        flat, d_flat = rows(x), rows(dy)
        if wants_x or wants_a:
            g = (d_flat @ b) * ctx.scale
            dx = (g @ a).reshape(x.shape) if wants_x else None
            da = g.T @ flat if wants_a else None
        if wants_b:
            db = d_flat.T @ (F.linear(flat, a) * ctx.scale)
        return dx, da, db, None, dy if wants_res else None


def refuses_twice(gradients: Callable[[Any, torch.Tensor], Any]) -> Callable[..., Any]:
    """A `backward` on `gradients`, whose results raise when they are differentiated in turn.

    torch's `once_differentiable` ties them to `dy` alone. That of `y.sum()` waits for no gradient, and then a second
    derivative silently takes this pass for a constant: here they are tied to what was saved as well.
    """

    def backward(ctx: Any, dy: torch.Tensor):
        # Microseconds, which are for those who may ask for second derivatives.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gradients(ctx, dy)
        with torch.no_grad():
            found = gradients(ctx, dy)
        saved = [each for each in ctx.saved_tensors if each is not None]
        return tuple(None if each is None else _Once.apply(each, dy, *saved) for each in found)

    return backward


class _Once(torch.autograd.Function):
    """A gradient, tied to what it depends on by a derivative that raises."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor):
        raise RuntimeError(
            "Triton layers and fused MLPs cannot be differentiated twice: write use_triton=False, and do not fuse"
        )


def check_branch(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, res: torch.Tensor | None) -> None:
    """Raises `ValueError` unless (..., K), (R, K), (N, R) and, if given, (..., N) are the shapes."""
    shapes = f"x {tuple(x.shape)}, lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}"
    if a.ndim != 2 or b.ndim != 2 or x.shape[-1:] != a.shape[1:] or b.shape[1] != a.shape[0]:
        raise ValueError(f"{shapes}: want (..., in), (dim, in) and (out, dim)")
    if res is not None and res.shape != (*x.shape[:-1], b.shape[0]):
        raise ValueError(f"{shapes}, and res is {tuple(res.shape)}, not {(*x.shape[:-1], b.shape[0])}")


def forward_rows(x, w, bias, a, b, scale: float) -> torch.Tensor:
    """`x @ w.T + bias + scale * (x @ a.T) @ b.T`: (M, K), (N, K), (N,), (R, K), (N, R) -> (M, N)."""
    return changeable(x, w.T, bias).addmm_(F.linear(x, a) * scale, b.T)


def backward_rows(dy, x, w, a, b, scale: float, wants_x: bool = True):
    """The gradients of `x` (None unless wanted), `a` and `b` of `forward_rows`; `x @ a.T` is computed again."""
    g = (dy @ b) * scale
    dx = (dy @ w).addmm_(g, a) if wants_x else None
    return dx, g.T @ x, dy.T @ (F.linear(x, a) * scale)


def changeable(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, scale: float = 1) -> torch.Tensor:
    """`scale * x @ w + bias`: (M, K), (K, N), (N,) -> (M, N), of one dtype, in a tensor that may be added to in place.

    Not by `mm` or `addmm`: their results checkpointing may keep (`create_selective_checkpoint_contexts`).
    """
    # What is multiplied by beta=0 is not read by torch, but may be by what a compiler makes of it.
    blank = x.new_zeros if torch.compiler.is_compiling() else x.new_empty
    out = blank(x.shape[0], w.shape[1])
    if bias is None:
        return out.addmm_(x, w, beta=0, alpha=scale)
    return torch.addmm(bias, x, w, alpha=scale, out=out)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes on `x`: autocast's where it is on (not for float64), else its own."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in _WITH_AUTOCAST or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def as_they_are(t: torch.Tensor) -> contextlib.AbstractContextManager:
    """Inside, operations on the device of `t` keep the dtypes of their operands, also where autocast is on.

    A backward pass may run under another autocast than its forward pass, and operations in place do not follow one.
    """
    # A graph that is compiled has both passes under one autocast, and their operands in its dtype.
    as_is = not torch._C._is_any_autocast_enabled() or torch.compiler.is_compiling()
    if as_is or compute_dtype(t) == t.dtype:
        return contextlib.nullcontext()
    return torch.autocast(t.device.type, enabled=False)


def rows(t: torch.Tensor) -> torch.Tensor:
    """(..., C) as (M, C)."""
    return t if t.ndim == 2 else t.reshape(-1, t.shape[-1])


def unflattened(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(M, N) as (..., N) with the leading dimensions of `like`.

    Not by `view`: autograd refuses to change a view in place that a custom function has made.
    """
    if like.ndim == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, [*like.shape[:-1], y.shape[-1]])
