"""The few array operations a layout needs, for numpy, jax and torch, and the moves between the three.

Nothing here imports torch before a tensor or `kind="torch"` is met. A move shares memory where it can:

    jax <-> torch    dlpack, when both are on one device (one CPU, or one GPU)
    numpy <-> torch  a view; bfloat16 and float8 travel as same-width integers, so every bit arrives
    numpy <-> jax    numpy's view of a CPU array; jax decides about the other way
    anything else    one copy through the host

Shared memory is the caller's to respect: a jax array is immutable by contract, so a tensor that shares it must
not be written in place, and on a GPU jax refuses to donate an array while a tensor shares it ("Donation requested
for buffer with external reference"). `copy=True` on the public functions gives independent arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with numpy's dtype names
import numpy as np

Kind = Literal["numpy", "jax", "torch"]
KINDS: tuple[Kind, ...] = ("numpy", "jax", "torch")


class Ops(Protocol):
    """What a layout asks of an array library."""

    def transpose(self, x: Any, perm: tuple[int, ...]) -> Any: ...
    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any: ...
    def flip(self, x: Any, axes: tuple[int, ...]) -> Any: ...
    def stack(self, xs: Sequence[Any]) -> Any: ...
    def concat(self, xs: Sequence[Any], axis: int) -> Any: ...
    def contiguous(self, x: Any) -> Any: ...
    def copy(self, x: Any) -> Any: ...
    def cast(self, x: Any, dtype: np.dtype) -> Any: ...


class _NumpyOps:
    def transpose(self, x: Any, perm: tuple[int, ...]) -> Any:
        return np.transpose(x, perm)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        return np.reshape(x, shape)

    def flip(self, x: Any, axes: tuple[int, ...]) -> Any:
        return np.flip(x, axes)

    def stack(self, xs: Sequence[Any]) -> Any:
        return np.stack(xs)

    def concat(self, xs: Sequence[Any], axis: int) -> Any:
        return np.concatenate(xs, axis)

    def contiguous(self, x: Any) -> Any:
        # ascontiguousarray turns a scalar into shape (1,).
        return np.ascontiguousarray(x).reshape(np.shape(x))

    def copy(self, x: Any) -> Any:
        return np.array(x, copy=True)

    def cast(self, x: Any, dtype: np.dtype) -> Any:
        return np.asarray(x).astype(dtype, copy=False)


class _JaxOps:
    def transpose(self, x: Any, perm: tuple[int, ...]) -> Any:
        return jnp.transpose(x, perm)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        return jnp.reshape(x, shape)

    def flip(self, x: Any, axes: tuple[int, ...]) -> Any:
        return jnp.flip(x, axes)

    def stack(self, xs: Sequence[Any]) -> Any:
        return jnp.stack(xs)

    def concat(self, xs: Sequence[Any], axis: int) -> Any:
        return jnp.concatenate(xs, axis)

    def contiguous(self, x: Any) -> Any:
        return x  # jax arrays are dense and row-major to every consumer

    def copy(self, x: Any) -> Any:
        return jnp.array(x, copy=True)

    def cast(self, x: Any, dtype: np.dtype) -> Any:
        return jnp.asarray(x).astype(dtype)


class _TorchOps:
    def transpose(self, x: Any, perm: tuple[int, ...]) -> Any:
        return x.permute(perm)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        return x.reshape(shape)

    def flip(self, x: Any, axes: tuple[int, ...]) -> Any:
        return x.flip(axes)

    def stack(self, xs: Sequence[Any]) -> Any:
        return _torch().stack(list(xs))

    def concat(self, xs: Sequence[Any], axis: int) -> Any:
        return _torch().cat(list(xs), axis)

    def contiguous(self, x: Any) -> Any:
        return x.contiguous()

    def copy(self, x: Any) -> Any:
        return x.clone()

    def cast(self, x: Any, dtype: np.dtype) -> Any:
        return x.to(torch_dtype(dtype))


_OPS: dict[Kind, Ops] = {"numpy": _NumpyOps(), "jax": _JaxOps(), "torch": _TorchOps()}


def ops_of(kind: Kind) -> Ops:
    return _OPS[kind]


def kind_of(x: Any) -> Kind:
    """Which library `x` belongs to; a `TypeError` names anything that is not an array."""
    torch = sys.modules.get("torch")  # a tensor cannot exist before torch is imported
    if torch is not None and isinstance(x, torch.Tensor):
        return "torch"
    if isinstance(x, jax.Array):
        return "jax"
    if isinstance(x, np.ndarray | np.generic):
        return "numpy"
    raise TypeError(f"expected a numpy, jax or torch array, got {type(x).__name__}")


def shape_dtype(x: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array of any kind or of a `jax.ShapeDtypeStruct`, without touching its values."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return tuple(x.shape), numpy_dtype(x.dtype)
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"expected an array or a jax.ShapeDtypeStruct, got {type(x).__name__}")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError("a typed PRNG key is not a parameter and has no PyTorch counterpart")
    dtype = np.dtype(x.dtype)
    if dtype.kind in "OSUMm" or dtype.type is np.void:
        raise TypeError(f"dtype {dtype} holds no numbers")
    return tuple(x.shape), dtype if dtype.isnative else dtype.newbyteorder("=")


def check_values(x: Any) -> None:
    """**Raises** `TypeError` unless `x` is an array that holds plain dense values."""
    if kind_of(x) == "torch":
        if x.device.type == "meta":
            raise TypeError("a tensor on torch's meta device holds no values; load the weights first")
        if hasattr(x, "__tensor_flatten__"):
            raise TypeError(
                f"a {type(x).__name__} keeps its values in other tensors; make it dense first: `.to(dtype)` "
                "dequantises, `.full_tensor()` gathers a DTensor"
            )
        if x.layout != _torch().strided or x.is_quantized:
            raise TypeError(f"cannot convert a tensor of layout {x.layout}, dtype {x.dtype}; make it dense first")
    shape_dtype(x)


def numpy_dtype(dtype: Any) -> np.dtype:
    """The numpy (or ml_dtypes) dtype of a torch dtype."""
    name = str(dtype).removeprefix("torch.")
    try:
        return np.dtype(name)
    except TypeError:
        raise TypeError(f"numpy and ml_dtypes have no counterpart of {dtype}; dequantise the tensor first") from None


def torch_dtype(dtype: np.dtype) -> Any:
    """The torch dtype of a numpy (or ml_dtypes) dtype."""
    found = getattr(_torch(), np.dtype(dtype).name, None)
    if found is None:
        raise TypeError(f"torch has no counterpart of dtype {np.dtype(dtype).name}; cast the array first")
    return found


def convert(x: Any, kind: Kind) -> Any:
    """`x` as an array of `kind`, sharing memory where the table in this module's docstring says so."""
    check_values(x)
    source = kind_of(x)
    if source == "numpy":
        x = np.asarray(x, shape_dtype(x)[1])  # in this machine's byte order, which the others take for granted
    if source == kind:
        return x.detach() if kind == "torch" else x
    if source == "jax" and kind == "torch" and _can_share_jax(x):
        return _torch().from_dlpack(x)
    if source == "torch" and kind == "jax" and _can_share_torch(x):
        return jax.dlpack.from_dlpack(x.detach().contiguous())
    host = _to_numpy(x, source)
    return host if kind == "numpy" else jnp.asarray(host) if kind == "jax" else _numpy_to_torch(host)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays of any kinds agree in shape, dtype and every bit (so NaN equals NaN, 0 not -0)."""
    if a is b:
        return True
    if shape_dtype(a) != shape_dtype(b):
        return False
    left, right = (_OPS["numpy"].contiguous(convert(x, "numpy")) for x in (a, b))
    return bool(np.array_equal(left.reshape(-1).view(np.uint8), right.reshape(-1).view(np.uint8)))


def _torch() -> Any:
    import torch

    return torch


def _to_numpy(x: Any, source: Kind) -> np.ndarray:
    if source == "torch":
        torch = _torch()
        host, dtype = x.detach().cpu().contiguous(), numpy_dtype(x.dtype)
        if dtype.isbuiltin == 1:
            return host.numpy()
        # torch refuses bfloat16 and float8 to numpy; as integers of the same width every bit arrives.
        return host.view(getattr(torch, f"uint{8 * dtype.itemsize}")).numpy().view(dtype)
    if source == "jax" and not x.is_fully_addressable:
        raise ValueError(
            f"an array of shape {x.shape} has shards on other hosts; gather it first, for example with "
            "`jax.experimental.multihost_utils.process_allgather`"
        )
    return np.asarray(x)


def _numpy_to_torch(x: np.ndarray) -> Any:
    torch = _torch()
    # A jax array's host view and a read-only memory map must not become a writable tensor.
    x = np.array(x) if not x.flags.writeable or not x.flags.c_contiguous else x
    if x.dtype.isbuiltin == 1:
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(f"uint{8 * x.dtype.itemsize}")).view(torch_dtype(x.dtype))


def _can_share_jax(x: jax.Array) -> bool:
    """One local device that torch also drives, and a dtype that both libraries' dlpack knows."""
    if not x.is_fully_addressable or len(x.devices()) != 1 or not _crosses_dlpack(np.dtype(x.dtype)):
        return False
    platform = next(iter(x.devices())).platform
    return platform == "cpu" or (platform in ("gpu", "cuda", "rocm") and _torch().cuda.is_available())


def _can_share_torch(x: Any) -> bool:
    """The tensor lies where jax would put a new array, so sharing it does not move the computation."""
    if not _crosses_dlpack(numpy_dtype(x.dtype)):
        return False
    backend = jax.default_backend()
    return x.device.type == "cpu" if backend == "cpu" else x.device.type == "cuda" and backend in ("gpu", "cuda")


def _crosses_dlpack(dtype: np.dtype) -> bool:
    # Booleans and float8 joined dlpack late; the host route keeps their bits on every version.
    return dtype.name == "bfloat16" or (dtype.isbuiltin == 1 and dtype.kind in "iufc")
