"""MLPs whose projections have adapters, as one autograd function that keeps only their narrow side.

    SwiGLU      down(silu(gate(x)) * up(x))      kept: x, gate(x), up(x)
    ReLU²       down(relu(up(x)) ** 2)           kept: x, up(x)

Layer by layer autograd also keeps the activation, the product and the input of `down`, each of tokens times
intermediate features. Here they are computed again in the backward pass, by elementwise operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import lora_autograd as plain
from . import triton_linear
from .joining import joined
from .lora_autograd import as_they_are, compute_dtype, refuses_twice, rows, unflattened
from .lora_making import is_distributed
from .lora_modules import LinearLoRA, TritonLinearLoRA, is_trained

CHECKED_TOKENS = 16


def fused_lora_swiglu_mlp(gate: LinearLoRA, up: LinearLoRA, down: LinearLoRA, x: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))`: (..., in) -> (..., out). Bases stay frozen, biases included.

    **Raises:** `ValueError` that names a projection and why it cannot take part: not adapted, DoRA, active dropout, a
    quantised base or one that is not frozen, hooks, a DTensor, or Triton in one and not in another.
    """
    return _fused(_swiglu, _swiglu_gradient, x, gate, up, down)


def fused_lora_relu2_mlp(up: LinearLoRA, down: LinearLoRA, x: torch.Tensor) -> torch.Tensor:
    """`down(relu(up(x)) ** 2)`; the rest as `fused_lora_swiglu_mlp`."""
    return _fused(_relu2, _relu2_gradient, x, up, down)


def install_fused_lora_mlp(model: nn.Module) -> int:
    """Makes every MLP of `model` whose projections have adapters run fused; returns how many.

    An MLP is a module with `up_proj`, `down_proj` and maybe `gate_proj`. It stays an instance of its class and keeps
    its names. Each is compared with its own forward on a few random tokens first, so the weights have to be there.

    **Raises:** before anything is changed: `ValueError` if there is no such module, or that names one which computes
    something else, or a projection that cannot take part.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        adapted = [isinstance(getattr(module, each, None), LinearLoRA) for each in ("up_proj", "down_proj")]
        if all(adapted) and not isinstance(module, FusedLoRAMLP):
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no MLP to fuse: modules with up_proj and down_proj, both adapted by "
            "apply_lora_to_linear_modules"
        )
    for name, module in found.items():
        _compare(name, module)
    for module in found.values():
        module.__class__ = joined(FusedLoRAMLP, type(module))
    return len(found)


class FusedLoRAMLP(nn.Module):
    """What `install_fused_lora_mlp` puts before an MLP's own class."""

    up_proj: LinearLoRA
    down_proj: LinearLoRA

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _run(self, x)


class LoRAMLPFunction(torch.autograd.Function):
    """`down(act(*(project(x) for all projections but the last)))`.

    Arguments: `x` (..., K), `act` and its gradient, whether to run Triton kernels, then (weight, bias, A, B, scale) of
    each projection, `down` last. Gradients for `x` and the factors.
    """

    @staticmethod
    def forward(ctx: Any, x, act, act_gradient, triton, *flat):
        *into, down = _in_fives(flat)
        forward_rows, _ = _products(triton)
        inner = [forward_rows(rows(x), *projection) for projection in into]
        y = forward_rows(act(*inner), *down)
        tensors = [t for projection in (*into, down) for t in (projection[0], *projection[2:4])]
        ctx.save_for_backward(x, *inner, *tensors)
        ctx.rest = act, act_gradient, triton, [projection[4] for projection in (*into, down)]
        return unflattened(y, x)

    @staticmethod
    @refuses_twice
    def backward(ctx: Any, dy: torch.Tensor):
        with as_they_are(dy):
            return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    act, act_gradient, triton, scales = ctx.rest
    _, backward_rows = _products(triton)
    count = len(scales)
    x, *saved = ctx.saved_tensors
    inner, tensors = saved[: count - 1], saved[count - 1 :]
    weights = [(*tensors[3 * i : 3 * i + 3], scales[i]) for i in range(count)]
    d_hidden, *d_down = backward_rows(rows(dy), act(*inner), *weights[-1])
    gradients, dx = [], None
    for d_inner, projection in zip(act_gradient(d_hidden, *inner), weights, strict=False):
        part, *d_factors = backward_rows(d_inner, rows(x), *projection, ctx.needs_input_grad[0])
        dx = part if dx is None else dx.add_(part)
        gradients += [None, None, *d_factors, None]
    dx = None if dx is None else dx.reshape(x.shape)
    return dx, None, None, None, *gradients, None, None, *d_down, None


def _swiglu(e: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return F.silu(e) * u


def _swiglu_gradient(dh: torch.Tensor, e: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(dh * u, e), dh * F.silu(e)


def _relu2(e: torch.Tensor) -> torch.Tensor:
    return F.relu(e).square_()


def _relu2_gradient(dh: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor]:
    return (F.relu(e).mul_(2).mul_(dh),)


def _fused(act: Any, act_gradient: Any, x: torch.Tensor, *projections: LinearLoRA) -> torch.Tensor:
    for projection in projections:
        if (reason := _reason(projection)) is not None:
            raise ValueError(f"{getattr(projection, 'where', '')}{reason}, so this MLP cannot run fused")
    triton = [isinstance(projection, TritonLinearLoRA) for projection in projections]
    if len(set(triton)) > 1:
        raise ValueError("some projections of this MLP were made with use_triton and some without: adapt them alike")
    if triton[0]:
        triton_linear.require(projections[0], x, projections[0].weight)
    dtype = compute_dtype(x)
    flat: list[Any] = []
    for each in projections:
        bias = None if each.bias is None else each.bias.to(dtype)
        flat += [each.weight.to(dtype), bias, each.lora_A.weight.to(dtype), each.lora_B.weight.to(dtype), each.scale]
    return LoRAMLPFunction.apply(x.to(dtype), act, act_gradient, triton[0], *flat)


def _reason(projection: nn.Module) -> str | None:
    if not isinstance(projection, LinearLoRA):
        return f"a {type(projection).__name__} has no adapter"
    if projection.use_dora:
        return "the adapter is DoRA's"
    if projection.dropout_p and projection.training:
        return f"dropout={projection.dropout_p} is active"
    if not projection.base_is_plain:
        return "the base has a forward of its own"
    if is_trained(projection.weight, projection.bias):
        return "weight or bias are to be trained"
    if projection._forward_pre_hooks or projection._forward_hooks or projection._backward_hooks:
        return "it has hooks, which would not run"
    if is_distributed(projection.weight) or is_distributed(projection.lora_A.weight):
        return "its parameters are DTensors"
    return None


def _products(triton: bool) -> tuple[Any, Any]:
    if not triton:
        return plain.forward_rows, plain.backward_rows

    def forward(x, w, bias, a, b, scale):
        return triton_linear.forward_rows(x, w, bias, a, b, scale, 0.0, None, True)[0]

    def backward(dy, x, w, a, b, scale, wants_x=True):
        wants = (wants_x, True, True)
        return triton_linear.backward_rows(dy, x, w, a, b, scale, 0.0, True, None, None, wants)

    return forward, backward


def _in_fives(flat: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return [flat[i : i + 5] for i in range(0, len(flat), 5)]


def _run(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    if getattr(mlp, "gate_proj", None) is None:
        return fused_lora_relu2_mlp(mlp.up_proj, mlp.down_proj, x)
    return fused_lora_swiglu_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj, x)


@torch.no_grad()
def _compare(name: str, mlp: Any) -> None:
    """Raises unless the MLP's own forward is what `_run` computes."""
    up = mlp.up_proj
    if up.weight.is_meta:
        raise ValueError(f"{name}: weights are on the meta device: load them before install_fused_lora_mlp")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CHECKED_TOKENS, up.in_features, generator=generator).to(up.weight.device, up.weight.dtype)
    # Activations are told apart where they bend: scaled so that their inputs are of the size of 3.
    x *= 3 / up(x).float().std().clamp(min=1e-3)
    own, fused = mlp(x), _run(mlp, x)
    same = isinstance(own, torch.Tensor) and own.shape == fused.shape
    if not same or (own - fused).float().norm() > 32 * torch.finfo(own.dtype).eps * own.float().norm():
        kind = "down(relu(up(x)) ** 2)" if getattr(mlp, "gate_proj", None) is None else "down(silu(gate(x)) * up(x))"
        raise ValueError(f"{name}: {type(mlp).__name__} computes something other than {kind}, so it cannot run fused")
