"""Launches the Triton kernels of `lora_jax/kernels` on torch tensors: 2-D, of one dtype, contiguous or strided.

Letters, as in the kernel files:
    M tokens    K input features    N output features    R rank

A LoRA linear is four calls forward and backward, with `h` kept in between (M * R elements):

    h = down(x, a, scale, drop);   y = forward(x, w, h, b, bias)
    g = down(dy, b.T, scale);      dx = input_gradient(dy, w, g, a, drop)
    da = outer(g, x, drop).T;      db = outer(h, dy)

This drops elements of `x`. To drop elements of the low-rank result instead, give `drop` to `forward`, to `g`'s `down`
and to `db`'s `outer`, and to no other.

`w` is (K, N): pass `linear.weight.T`, a view. So are `a` (K, R), PyTorch's `lora_A.weight.T`, and `b` (R, N).
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_jax.kernels.triton_configs import GemmConfig, PassConfig, down_config, gemm_config, outer_config, padded

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
        return round(self.rate * 65536)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by: the inverse of the exact probability of being kept."""
        return 65536 / (65536 - self.threshold) if self.threshold < 65536 else 0.0


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
    (m, k), r = x.shape, a.shape[1]
    drop = drop if drop and drop.threshold else None
    out = x.new_empty(m, r)
    if m == 0:
        return out
    tma = x.element_size() == 2 and _describable(x)
    config = config or down_config(m, k, r, x.element_size(), tma=tma, dropout=drop is not None)
    tma &= config.tma
    blocks = _blocks(m, config.rows)
    parts = config.split(blocks, _blocks(k, config.columns), sms(x.device.index))
    target = out if parts == 1 else out.new_empty((parts, m, r), dtype=_float32())
    _kernel("down")[(blocks * parts,)](
        _described(x, config.rows, config.columns) if tma else x,
        a,
        target,
        drop.words if drop else None,
        scale * drop.scale if drop else scale,
        drop.threshold if drop else 0,
        m,
        k,
        *x.stride(),
        *a.stride(),
        m * r,
        *out.stride(),
        R=r,
        RP=padded(r),
        BM=config.rows,
        BK=config.columns,
        SPLIT=parts,
        DROP=drop is not None,
        TMA=tma,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out if parts == 1 else _sum(target, out)


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
    (m, r), c = t.shape, v.shape[1]
    drop = drop if drop and drop.threshold else None
    out = t.new_empty((r, c), dtype=_float32())
    if m == 0:
        return out.zero_()
    tma = v.element_size() == 2 and _describable(v)
    config = config or outer_config(m, c, r, v.element_size(), tma=tma, dropout=drop is not None)
    tma &= config.tma
    blocks = _blocks(c, config.columns)
    parts = config.split(blocks, _blocks(m, config.rows), sms(v.device.index))
    target = out if parts == 1 else out.new_empty((parts, r, c))
    _kernel("outer")[(blocks * parts,)](
        t,
        _described(v, config.rows, config.columns) if tma else v,
        target,
        drop.words if drop else None,
        drop.scale if drop else 1.0,
        drop.threshold if drop else 0,
        m,
        c,
        *t.stride(),
        *v.stride(),
        r * c,
        *out.stride(),
        R=r,
        RP=padded(r),
        BM=config.rows,
        BC=config.columns,
        SPLIT=parts,
        DROP=drop is not None,
        TMA=tma,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out if parts == 1 else _sum(target, out)


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
    check(
        {"x": x, "w": w, "h": h, "b": b} | ({} if bias is None else {"bias": bias}),
        [("x", 1, "w", 0), ("x", 0, "h", 0), ("h", 1, "b", 0), ("w", 1, "b", 1)]
        + ([] if bias is None else [("w", 1, "bias", 0)]),
    )
    (m, k), n, r = x.shape, w.shape[1], h.shape[1]
    drop = drop if drop and drop.threshold else None
    y = x.new_empty(m, n)
    if m == 0:
        return y
    rp = padded(r)
    transposed = w.stride(0) == 1 != w.stride(1)
    tma = x.element_size() == 2 and all(map(_describable, (x, w.T if transposed else w, y)))
    config = config or gemm_config(m, n, k, r, x.element_size(), tma=tma, dropout=drop is not None)
    tiles = _blocks(m, config.bm) * _blocks(n, config.bn)
    if not tma:
        w_argument = w
    elif transposed:
        w_argument = _described(w.T, config.bn, config.bk)
    else:
        w_argument = _described(w, config.bk, config.bn)
    _kernel("gemm")[(min(tiles, config.per_sm * sms(x.device.index)) if config.per_sm else tiles,)](
        _described(x, config.bm, config.bk) if tma else x,
        w_argument,
        h,
        b,
        bias,
        _described(y, config.bm, config.bn // config.chunks) if tma else y,
        drop.words if drop else None,
        drop.scale if drop else 1.0,
        drop.threshold if drop else 0,
        m,
        n,
        k,
        *x.stride(),
        *w.stride(),
        *h.stride(),
        *b.stride(),
        *y.stride(),
        R=r,
        RP=rp,
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        GROUP=config.group,
        CHUNKS=config.chunks,
        PREFETCH=config.prefetch(rp, x.element_size()),
        BIAS=bias is not None,
        DROP=drop is not None,
        W_T=transposed,
        TMA=tma,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y


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
    if interpreting():
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
def interpreting() -> bool:
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


def _describable(tensor: torch.Tensor) -> bool:
    """Whether a descriptor can be made: rows contiguous, every row at a multiple of 16 bytes."""
    return (
        tensor.stride(1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.data_ptr() % 16 == 0
        and _has_tma(tensor.device.index)
    )


def _described(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def _sum(parts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    size, block = out.numel(), 1024
    _kernel("sum")[(_blocks(size, block),)](parts, out, size, PARTS=parts.shape[0], BLOCK=block, num_warps=4)
    return out


def _float32() -> torch.dtype:
    import torch

    return torch.float32


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
