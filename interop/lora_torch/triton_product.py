"""The products of full size of a LoRA linear on torch tensors, each in the fastest way that there is for it.

Letters, and how tensors lie, as in `triton_launch`:
    M tokens    K input features    N output features    R rank

The kernels are those for Hopper (`triton_hopper_gemm`, `triton_hopper_adapted`). Where they cannot run it is torch's
product: `triton_gemm` loses more against a library's product than it saves, on Hopper at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lora_jax.kernels import triton_plans as plans
from lora_jax.kernels.triton_configs import HopperConfig
from lora_jax.kernels.triton_plans import Launch, Matrix

from .lora_autograd import changeable
from .triton_launch import Drop, check, dense, given, up
from .triton_run import Ready, has_hopper_kernels, lies, ready, seen, sms

# From so many features and elements of `x` on, a pass over them takes longer than tiles that wait for each other: 10 us
# on an H100.
LEAST_FEATURES, LEAST_ELEMENTS = 1024, 2**23


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    drop: Drop | None = None,
    *,
    transposed: bool = False,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    """`x @ w + mask / (1 - rate) * (h @ b) + bias`: (M, K), (K, N), (M, R), (R, N), (N,) -> (M, N).

    `transposed`: `w` is (N, K) and `b` is (N, R), as PyTorch stores them. `config`: of the kernel for Hopper, which is
    then taken for few tiles too.

    Raises: as `triton_launch.down`.
    """
    if drop is not None:
        return by_library(x, w.T, h, b.T, bias, drop) if transposed else by_library(x, w, h, b, bias, drop)

    def plan() -> Launch | None:
        right, tail = (w.T, b.T) if transposed else (w, b)
        check(
            given(x=x, w=right, h=h, b=tail, bias=bias),
            [("x", 1, "w", 0), ("x", 0, "h", 0), ("h", 1, "b", 0), ("w", 1, "b", 1), ("w", 1, "bias", 0)],
        )
        return _planned_product((seen(x), seen(right), seen(h), seen(tail)), x, bias, config)

    launch = ready(("product", lies(x), lies(w), lies(h), lies(b), lies(bias), transposed, config), plan)
    return _with_tail(launch, x, w, h, b, bias, transposed)


def adapted(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    transposed: bool = False,
    config: HopperConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x @ w + h @ b + bias` and `h = scale * x @ a`: (M, K), (K, N), (K, R), (R, N), (N,) -> (M, N), (M, R).

    One kernel where `product` is one, R is at most 16 and `x` is large, or else `h` is torch's product and the rest is
    `product`. `transposed`: `w` is (N, K), `a` (R, K) and `b` (N, R). `config`, of the kind of `ADAPTED`: this kernel
    also for a small `x`.

    The one kernel begins when no other keeps a multiprocessor: where processes communicate meanwhile
    (`torch.distributed`), there are two.

    Raises: as `triton_launch.down`.
    """
    alone = config is not None or not (torch.distributed.is_available() and torch.distributed.is_initialized())

    def plan() -> Launch | None:
        right, thin, tail = (w.T, a.T, b.T) if transposed else (w, a, b)
        check(
            given(x=x, w=right, a=thin, b=tail, bias=bias),
            [("x", 1, "w", 0), ("x", 1, "a", 0), ("a", 1, "b", 0), ("w", 1, "b", 1), ("w", 1, "bias", 0)],
        )
        operands = seen(x), seen(right), seen(thin), seen(tail)
        large = config or x.shape[1] >= LEAST_FEATURES and x.numel() >= LEAST_ELEMENTS
        if alone and large and plans.hopper_adapted_fits(*operands):
            return _planned(plans.hopper_adapted, (*operands, scale), x, bias, config)
        h = Matrix.row_major(len(x), thin.shape[1], x.element_size(), tma=True)
        return _planned_product((*operands[:2], h, operands[3]), x, bias, config)

    # One question for both kernels.
    key = "adapted", lies(x), lies(w), lies(a), lies(b), lies(bias), scale, transposed, config, alone
    launch = ready(key, plan)
    if launch is not None and launch.plan.kernel == "hopper_adapted":
        n, r = (w.shape[0], a.shape[0]) if transposed else (w.shape[1], a.shape[1])
        if launch.plan.numbers["W_T"] != transposed:
            w, a, b = w.T, a.T, b.T
        y, h = x.new_empty(x.shape[0], n), x.new_empty(x.shape[0], r)
        launch(y, {"x_ptr": x, "w_ptr": w, "a_ptr": a, "b_ptr": b, "h_ptr": h, "bias_ptr": bias})
        return y, h
    h = changeable(x, a.T if transposed else a, scale=scale)
    return _with_tail(launch, x, w, h, b, bias, transposed), h


def by_library(
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    drop: Drop | None = None,
) -> torch.Tensor:
    """What `product` computes, with torch's: the adapter's part first, and the product added into it.

    That part is rounded before: one rounding more than a kernel has. With `drop` it is `up`'s, else torch's too.
    """
    part = up(h, b, bias, drop) if drop else changeable(h, b, bias)
    return part.addmm_(x, w)


def _with_tail(
    launch: Ready | None,
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    if launch is None:
        return by_library(x, w.T, h, b.T, bias) if transposed else by_library(x, w, h, b, bias)
    y = x.new_empty(x.shape[0], w.shape[0 if transposed else 1])
    if launch.plan.numbers["W_T"] != transposed:
        w, b = w.T, b.T
    return launch(y, {"x_ptr": x, "w_ptr": w, "h_ptr": h, "b_ptr": b, "bias_ptr": bias})


def _planned_product(
    operands: tuple[Matrix, Matrix, Matrix, Matrix],
    x: torch.Tensor,
    bias: torch.Tensor | None,
    config: HopperConfig | None,
) -> Launch | None:
    """The launch of `triton_hopper_gemm`, or None where it cannot run or the library is the better way.

    It is in float32, and where rows do not begin at multiples of 16 bytes.
    """
    return _planned(plans.hopper_gemm, operands, x, bias, config) if plans.hopper_fits(*operands) else None


def _planned(
    plan: Callable[..., Launch],
    operands: tuple[Any, ...],
    x: torch.Tensor,
    bias: torch.Tensor | None,
    config: HopperConfig | None,
) -> Launch | None:
    """`plan` of operands that fit, or None where the library is the better way.

    It is on other GPUs, with gaps in the bias, and for fewer tiles than half the multiprocessors, whose depth a library
    splits among those that would have none.
    """
    if not len(x) or not has_hopper_kernels(x.device.index) or bias is not dense(bias):
        return None
    count = sms(x.device.index)
    launch = plan(*operands, count, bias=bias is not None, config=config)
    return launch if config or launch.programs >= count // 2 else None
