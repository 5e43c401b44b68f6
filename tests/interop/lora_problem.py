"""An adapted torch linear, its operands, and what the float64 formulas of `lora_jax.reference` say of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lora_jax import reference

SCALE = 1.75  # alpha 7, dim 4 in most tests: neither 1 nor a power of two


def linear(k: int, n: int, dtype: torch.dtype = torch.float32, bias: bool = True, device: str = "cpu") -> nn.Linear:
    torch.manual_seed(k * n)
    return nn.Linear(k, n, bias=bias, dtype=dtype, device=device)


def randomise(layer: nn.Module) -> nn.Module:
    """Random factors, and magnitudes that are not the norms: at B = 0 most errors would go unseen."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            value = torch.randn(parameter.shape, generator=generator)
            value = value.abs() + 0.5 if name.endswith("magnitude") else value * parameter.shape[-1] ** -0.5
            with torch.no_grad():
                parameter.copy_(value)
    return layer


def tensors(*shape: int, n: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """`x` of `shape`, and `dy` with `n` features in its place."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = torch.randn(shape, generator=generator), torch.randn(*shape[:-1], n, generator=generator)
    return x.to(device, dtype).requires_grad_(), dy.to(device, dtype)


def one_sign(*tensors) -> None:
    """In bfloat16 sums of sums that cancel are lost in the bound: nothing wrong could be told from what is right."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.abs_()


def exact(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    assert got.shape == want.shape
    return float((got.detach().double() - want.detach().double()).abs().max() / want.detach().double().abs().max())


def run(layer, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """`y` and the gradients of `x`, A and B."""
    x.grad = None
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    grads = {"x": x.grad, "a": layer.lora_A.weight.grad, "b": layer.lora_B.weight.grad}
    assert all(grad is not None for grad in grads.values())
    return {"y": y, **grads}


def captured(layer, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor]]:
    """A CUDA graph of what `run` does, and the results that its replays write."""
    with torch.cuda.stream(torch.cuda.Stream()):
        run(layer, x, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        grads = torch.autograd.grad(y, [x, layer.lora_A.weight, layer.lora_B.weight], dy)
    # Detached: what keeps autograd's graph of another stream alive ties later passes to that stream.
    return graph, dict(zip(("y", "x", "a", "b"), (y.detach(), *grads), strict=True))


def check(
    found: dict[str, torch.Tensor],
    layer,
    x: torch.Tensor,
    dy: torch.Tensor,
    scale: float,
    keep: np.ndarray | None = None,
    keep_after: np.ndarray | None = None,
) -> None:
    """`found` is right to rounding, and neither zeros, nor the base alone, nor another scale would have passed.

    `keep`, `keep_after`: masks, 0 or 1 / (1 - rate), of the input and of the result of the low-rank branch.
    """
    w, a, b = (exact(each.weight).T for each in (layer, layer.lora_A, layer.lora_B))
    bias = 0.0 if layer.bias is None else exact(layer.bias)
    rows, d_rows = (exact(t).reshape(-1, t.shape[-1]) for t in (x, dy))

    def formulas(x, w, a, b, dy, bias, s, keep=keep, after=keep_after):
        keep = np.ones_like(x) if keep is None else keep
        after = np.ones_like(dy) if after is None else after
        h, g = s * (x * keep) @ a, s * (dy * after) @ b.T
        return {
            "y": x @ w + after * (h @ b) + bias,
            "x": dy @ w.T + keep * (g @ a.T),
            "a": ((x * keep).T @ g).T,
            "b": (h.T @ (dy * after)).T,
        }

    operands = (rows, w, a, b, d_rows, bias)
    want, magnitude = formulas(*operands, scale), formulas(*map(np.abs, operands), abs(scale))
    # Half precision leaves little to see of a tenth in a sum whose terms cancel.
    other_scale = formulas(*operands, (1.1 if x.dtype in (torch.float64, torch.float32) else 2) * scale)
    base = formulas(rows, w, 0 * a, 0 * b, d_rows, bias, scale)
    terms = sum(w.shape) + len(rows) + a.shape[1]
    for name, got in found.items():
        got = exact(got).reshape(want[name].shape)
        bound = reference.tolerance(str(x.dtype).removeprefix("torch."), terms) * magnitude[name]
        assert reference.excess(got, want[name], bound) <= 1, name
        for wrong in (np.zeros_like(got), base[name], other_scale[name]):
            assert reference.excess(wrong, want[name], bound) > 1, name
