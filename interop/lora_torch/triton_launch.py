"""Launches the Triton kernels of `lora_jax/kernels` on torch tensors: 2-D, of one dtype, contiguous or strided.

Letters, as in the kernel files:
    M tokens    K input features    N output features    R rank

A LoRA linear is these calls forward and backward, with `h` kept in between (M * R elements); `product` is in
`triton_product`:

    h = down(x, a, scale, drop);   y = product(x, w, h, b, bias)
    g = down(dy, b.T, scale);      dx = product(dy, w.T, g, a.T, None, drop)
    da = outer(g, x, drop).T;      db = outer(h, dy)

This drops elements of `x`. To drop elements of the low-rank result instead, give `drop` to `y`'s `product`, to `g`'s
`down` and to `db`'s `outer`, and to no other. Without dropout `triton_product.adapted` is both calls of a line.
`forward` and `input_gradient` are the two products by `triton_gemm`.

`w` is (K, N): pass `linear.weight.T`, a view. So are `a` (K, R), PyTorch's `lora_A.weight.T`, and `b` (R, N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_jax.kernels import triton_plans as plans
from lora_jax.kernels.triton_configs import GemmConfig, PassConfig

from .triton_run import interpreting, lies, ready, seen, sms

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
        """`seed`: two words of 32 bits. `row` and `column`: any, of the first element of `x` in the whole array."""
        import torch

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
    threshold = drop.threshold if drop else 0

    def plan() -> plans.Launch:
        check({"x": x, "a": a}, [("x", 1, "a", 0)])
        return plans.down(seen(x), seen(a), scale, threshold, sms(x.device.index), config=config)

    launch = ready(("down", lies(x), lies(a), scale, threshold, config), plan)
    out = x.new_empty(x.shape[0], a.shape[1])
    return launch(out, {"x_ptr": x, "a_ptr": a, "seed_ptr": _seeds(drop, x)}) if len(x) else out


def outer(
    t: torch.Tensor,
    v: torch.Tensor,
    drop: Drop | None = None,
    *,
    dtype: torch.dtype | None = None,
    transposed: bool = False,
    config: PassConfig | None = None,
) -> torch.Tensor:
    """`t.T @ drop(v)`: (M, R), (M, C) -> (R, C), contiguous; (C, R) if `transposed`. `da` is `outer(g, x, drop).T`.

    `dtype` is that of the result, which is summed in float32 and rounded once; None: float32.

    Raises: as `down`.
    """
    threshold = drop.threshold if drop else 0

    def plan() -> plans.Launch:
        check({"t": t, "v": v}, [("t", 0, "v", 0)])
        return plans.outer(seen(t), seen(v), threshold, sms(v.device.index), transposed=transposed, config=config)

    launch = ready(("outer", lies(t), lies(v), threshold, dtype, transposed, config), plan)
    shape = (v.shape[1], t.shape[1]) if transposed else (t.shape[1], v.shape[1])
    out = t.new_empty(shape, dtype=dtype or _float32())
    return launch(out, {"t_ptr": t, "v_ptr": v, "seed_ptr": _seeds(drop, v)}) if len(t) else out.zero_()


def up(
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    drop: Drop | None = None,
    *,
    config: PassConfig | None = None,
) -> torch.Tensor:
    """`mask / (1 - rate) * (h @ b) + bias`: (M, R), (R, N), (N,) -> (M, N), contiguous.

    Raises: as `down`.
    """
    threshold = drop.threshold if drop else 0
    bias = dense(bias)
    operands = given(h=h, b=b, bias=bias)
    t = h.new_empty(h.shape[0], b.shape[-1])

    def plan() -> plans.Launch:
        check(operands, [("h", 1, "b", 0), ("b", 1, "bias", 0)])
        return plans.up(*map(seen, (h, b, t)), threshold, bias=bias is not None, config=config)

    launch = ready(("up", *map(lies, operands.values()), threshold, config), plan)
    if not len(h):
        return t
    return launch(t, {"h_ptr": h, "b_ptr": b, "bias_ptr": bias, "seed_ptr": _seeds(drop, h)})


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    drop: Drop | None = None,
    *,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """`x @ w + mask / (1 - rate) * (h @ b) + bias`: (M, K), (K, N), (M, R), (R, N), (N,) -> (M, N), rounded once.

    `drop` drops elements of the low-rank result, (M, N); what drops elements of `x` goes to `down`.

    Raises: as `down`.
    """
    return _gemm(x, w, h, b, bias, drop, config)


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
    threshold = drop.threshold if drop else 0
    bias = dense(bias)
    operands = given(x=x, w=w, h=h, b=b, bias=bias)
    y = x.new_empty(x.shape[0], w.shape[-1])

    def plan() -> plans.Launch:
        check(operands, [("x", 1, "w", 0), ("x", 0, "h", 0), ("h", 1, "b", 0), ("w", 1, "b", 1), ("w", 1, "bias", 0)])
        return plans.gemm(
            *map(seen, (x, w, h, b, y)), threshold, sms(x.device.index), bias=bias is not None, config=config
        )

    launch = ready(("gemm", *map(lies, operands.values()), threshold, config), plan)
    if not len(x):
        return y
    return launch(y, {"x_ptr": x, "w_ptr": w, "h_ptr": h, "b_ptr": b, "bias_ptr": bias, "seed_ptr": _seeds(drop, x)})


def _seeds(drop: Drop | None, like: torch.Tensor) -> torch.Tensor | None:
    """What a kernel asks, if anything is dropped. No kernel's key knows of it, and its address is taken as it is."""
    if drop is None or not drop.threshold:
        return None
    if drop.words.get_device() != like.get_device():
        raise ValueError(f"the words of `drop` are on {drop.words.device}, and the operands on {like.device}")
    return drop.words


def check(tensors: dict[str, torch.Tensor], equal: list[tuple[str, int, str, int]]) -> None:
    """Raises unless the kernels can take these tensors; `equal` lists the dimensions that must agree.

    Those of a bias count if there is one.

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
    check_dtype(first, f"`{first_name}`")
    for left, i, right, j in equal:
        if right == "bias" and right not in tensors:
            continue
        if tensors[left].shape[i] != tensors[right].shape[j]:
            shapes = {name: tuple(tensors[name].shape) for name in (left, right)}
            raise ValueError(f"dimension {i} of `{left}` and dimension {j} of `{right}` differ: {shapes}")
    if interpreting():
        if first.dtype == torch.bfloat16:
            raise RuntimeError("TRITON_INTERPRET=1: Triton's interpreter multiplies bfloat16 wrongly; use float16")
    elif first.device.type != "cuda":
        raise RuntimeError(
            f"`{first_name}` is on {first.device}, and the Triton kernels need a CUDA GPU. Move the tensors there, or "
            "set TRITON_INTERPRET=1 before the first import of triton to run them slowly on the CPU."
        )


def check_dtype(tensor: torch.Tensor, name: str) -> None:
    """**Raises** `TypeError`, which begins with `name`, for a dtype that the kernels do not take."""
    # By the number of bits and not by a list, which would be an import of torch in every call of a layer.
    if not tensor.is_floating_point() or tensor.element_size() not in (2, 4):
        raise TypeError(f"{name} is {tensor.dtype}: the Triton kernels take float32, float16 and bfloat16")


def given(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Those that are there."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def dense(bias: torch.Tensor | None) -> torch.Tensor | None:
    """The kernels know no stride of a bias."""
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def _float32() -> torch.dtype:
    import torch

    return torch.float32
