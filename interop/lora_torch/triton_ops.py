"""The launches of `triton_launch` and `triton_product` as operations that torch.compile puts into a graph as they are.

Outside of compilation each is the launch itself: a registered operation costs microseconds more a call. Dropout is a
rate and four words on the device (`triton_launch.Drop`); without, words are None.
"""

from __future__ import annotations

import torch

from . import triton_launch as launch
from . import triton_product


def down(x: torch.Tensor, a: torch.Tensor, scale: float, rate: float = 0.0, words: torch.Tensor | None = None):
    """`scale * drop(x) @ a`: (M, K), (K, R) -> (M, R)."""
    return _in_graph(x, _down, launched_down)(x, a, scale, rate, words)


def outer(
    t: torch.Tensor,
    v: torch.Tensor,
    rate: float = 0.0,
    words: torch.Tensor | None = None,
    *,
    dtype: torch.dtype,
    transposed: bool = False,
) -> torch.Tensor:
    """`t.T @ drop(v)`: (M, R), (M, C) -> (R, C), or (C, R) if `transposed`, of `dtype`."""
    return _in_graph(t, _outer, launched_outer)(t, v, rate, words, dtype, transposed)


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    rate: float = 0.0,
    words: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """`x @ w + drop(h @ b) + bias`: (M, K), (K, N), (M, R), (R, N), (N,) -> (M, N).

    (N, K) and (N, R) if `transposed`.
    """
    return _in_graph(x, _product, launched_product)(x, w, h, b, bias, rate, words, transposed)


def adapted(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    *,
    transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x @ w + h @ b + bias` and `h = scale * x @ a`: (M, K), (K, N), (K, R), (R, N), (N,) -> (M, N), (M, R).

    (N, K), (R, K) and (N, R) if `transposed`.
    """
    return _in_graph(x, _adapted, launched_adapted)(x, w, a, b, bias, scale, transposed)


def launched_down(x: torch.Tensor, a: torch.Tensor, scale: float, rate: float, words: torch.Tensor | None):
    return launch.down(x, a, scale, _drop(rate, words))


def launched_outer(
    t: torch.Tensor, v: torch.Tensor, rate: float, words: torch.Tensor | None, dtype: torch.dtype, transposed: bool
) -> torch.Tensor:
    return launch.outer(t, v, _drop(rate, words), dtype=dtype, transposed=transposed)


def launched_product(
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    rate: float,
    words: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    return triton_product.product(x, w, h, b, bias, _drop(rate, words), transposed=transposed)


def launched_adapted(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    transposed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return triton_product.adapted(x, w, a, b, bias, scale, transposed=transposed)


def _drop(rate: float, words: torch.Tensor | None) -> launch.Drop | None:
    return None if words is None else launch.Drop(rate, words)


def _in_graph(tensor: torch.Tensor, operation, launched):
    return operation if torch.compiler.is_compiling() or tensor.is_meta else launched


_down = torch.library.custom_op(
    "lora_torch::down",
    launched_down,
    mutates_args=(),
    schema="(Tensor x, Tensor a, float scale, float rate, Tensor? words) -> Tensor",
)
_outer = torch.library.custom_op(
    "lora_torch::outer",
    launched_outer,
    mutates_args=(),
    schema="(Tensor t, Tensor v, float rate, Tensor? words, ScalarType dtype, bool transposed) -> Tensor",
)
_product = torch.library.custom_op(
    "lora_torch::product",
    launched_product,
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor h, Tensor b, Tensor? bias, float rate, Tensor? words, "
    "bool transposed) -> Tensor",
)
_adapted = torch.library.custom_op(
    "lora_torch::adapted",
    launched_adapted,
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, float scale, bool transposed) -> (Tensor, Tensor)",
)


@_down.register_fake
def _(x, a, scale, rate, words):
    return x.new_empty(x.shape[0], a.shape[1])


@_outer.register_fake
def _(t, v, rate, words, dtype, transposed):
    shape = (v.shape[1], t.shape[1]) if transposed else (t.shape[1], v.shape[1])
    return t.new_empty(shape, dtype=dtype)


@_product.register_fake
def _(x, w, h, b, bias, rate, words, transposed):
    return x.new_empty(x.shape[0], w.shape[0 if transposed else 1])


@_adapted.register_fake
def _(x, w, a, b, bias, scale, transposed):
    n, r = (w.shape[0], a.shape[0]) if transposed else (w.shape[1], a.shape[1])
    return x.new_empty(x.shape[0], n), x.new_empty(x.shape[0], r)
