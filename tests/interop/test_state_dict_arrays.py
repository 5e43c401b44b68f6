"""numpy, jax and torch values: every bit arrives, memory is shared or copied as promised, torch stays optional."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_torch import from_torch_state_dict, to_torch_state_dict
from lora_torch.arrays import convert, same_bits, shape_dtype

KINDS = ("numpy", "jax", "torch")
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int32", "uint8", "bool"]


def every_bit(dtype: str) -> np.ndarray:
    """Random bit patterns, NaNs of all payloads, infinities and subnormals among them."""
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return np.random.default_rng(0).integers(0, 2, (4, 6)).astype(bool)
    bits = np.random.default_rng(0).integers(0, 256, (4, 6 * kind.itemsize), dtype=np.uint8)
    return np.ascontiguousarray(bits).view(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_conversions_keep_every_bit(dtype: str, source: str, target: str) -> None:
    if "torch" in (source, target):
        pytest.importorskip("torch")
    start = every_bit(dtype)
    there = convert(convert(start, source), target)
    assert shape_dtype(there) == ((4, 6), np.dtype(dtype))
    assert same_bits(there, start)
    assert same_bits(convert(there, "numpy"), start)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_mixed_dtypes(kind: str) -> None:
    """bfloat16 weights transposed, a float32 norm, a scalar: through each library and back."""
    if kind == "torch":
        pytest.importorskip("torch")
    params = {
        "dense": {"kernel": jnp.asarray(every_bit("bfloat16"))},
        "norm": {"scale": jnp.asarray(every_bit("float32")[0])},
        "temperature": jnp.asarray(0.5),
    }
    state = to_torch_state_dict(params, preset="linen", kind=kind)
    assert tuple(state["dense.weight"].shape) == (6, 4) and tuple(state["temperature"].shape) == ()
    back = from_torch_state_dict(state, params, preset="linen")
    assert jax.tree.all(jax.tree.map(same_bits, params, back))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(back))


def test_same_bits_tells_zeros_and_nans_apart() -> None:
    nan = np.array([np.nan], np.float32)
    assert same_bits(nan, nan.copy())
    assert not same_bits(np.zeros(1, np.float32), -np.zeros(1, np.float32))
    assert not same_bits(np.zeros(1, np.float32), np.zeros((1, 1), np.float32))
    assert not same_bits(np.zeros(1, np.float32), np.zeros(1, np.int32))


def test_casting_rounds_to_nearest() -> None:
    values = np.random.default_rng(0).normal(size=(64,)).astype(np.float32)
    want = values.astype(ml_dtypes.bfloat16)
    like = {"bias": jax.ShapeDtypeStruct((64,), jnp.bfloat16)}
    kinds = ["numpy", "jax"] + (["torch"] if "torch" in sys.modules else [])
    for kind in kinds:
        got = from_torch_state_dict({"bias": convert(values, kind)}, like, dtype="like")
        assert same_bits(got["bias"], want)


def test_memory_is_shared_unless_copied() -> None:
    torch = pytest.importorskip("torch")
    scale = jax.block_until_ready(jnp.arange(64.0))
    address = scale.unsafe_buffer_pointer()
    shared = to_torch_state_dict({"scale": scale}, kind="torch")["weight"]
    assert shared.data_ptr() == address
    assert to_torch_state_dict({"scale": scale}, kind="torch", copy=True)["weight"].data_ptr() != address
    tensor = torch.arange(64.0)
    copied = from_torch_state_dict({"weight": tensor}, {"scale": scale}, copy=True)["scale"]
    tensor.zero_()
    assert np.array_equal(copied, np.arange(64.0))
    host = np.arange(64.0, dtype=np.float32)
    assert np.shares_memory(to_torch_state_dict({"scale": host})["weight"], host)
    assert not np.shares_memory(to_torch_state_dict({"scale": host}, copy=True)["weight"], host)


def test_read_only_and_strided_sources() -> None:
    """Read-only memory never becomes a writable tensor; a strided view is not taken for its buffer."""
    torch = pytest.importorskip("torch")
    frozen = np.arange(6, dtype=np.float32).reshape(2, 3)
    frozen.flags.writeable = False
    tensor = convert(frozen, "torch")
    tensor.zero_()
    assert frozen[1, 2] == 5
    strided = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    assert np.array_equal(convert(strided, "torch").numpy(), strided)
    big_endian = np.arange(3, dtype=">f4")
    assert np.array_equal(convert(big_endian, "torch").numpy(), [0, 1, 2])
    assert np.array_equal(convert(big_endian, "jax"), [0, 1, 2])
    assert convert(big_endian, "numpy").dtype == np.dtype("<f4")
    view = torch.arange(12.0).reshape(3, 4).t()
    assert np.array_equal(convert(view, "jax"), view.numpy())
    assert convert(view, "numpy").shape == (4, 3)


def test_parameters_with_gradients_are_detached() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones(2, 3))
    params = from_torch_state_dict({"weight": weight}, {"kernel": np.zeros((3, 2), np.float32)}, preset="linen")
    assert np.array_equal(params["kernel"], np.ones((3, 2)))
    kept = from_torch_state_dict(
        {"weight": weight}, {"kernel": np.zeros((3, 2), np.float32)}, preset="linen", kind="torch"
    )
    assert not kept["kernel"].requires_grad


def test_tensors_without_plain_values() -> None:
    torch = pytest.importorskip("torch")
    like = {"kernel": np.zeros((3, 2), np.float32)}
    with pytest.raises(TypeError, match="meta device holds no values"):
        from_torch_state_dict({"weight": torch.zeros(2, 3, device="meta")}, like, preset="linen", kind="numpy")
    with pytest.raises(TypeError, match="make it dense first"):
        from_torch_state_dict({"weight": torch.zeros(2, 3).to_sparse()}, like, preset="linen", kind="numpy")


@pytest.mark.parametrize("values", [["a"], [None], [(1, 2.0)], ["2020-01-01"]])
def test_dtypes_without_numbers(values: list) -> None:
    dtype = {"a": "U1", None: "O", (1, 2.0): "i4,f4", "2020-01-01": "M8[D]"}[values[0]]
    with pytest.raises(TypeError, match="bias: dtype .* holds no numbers"):
        to_torch_state_dict({"bias": np.array(values, dtype)})


def test_torch_is_not_imported() -> None:
    """Both converters on numpy, in a process that cannot import torch."""
    code = """
import sys
sys.modules["torch"] = None
import lora_torch
assert "jax" not in sys.modules, "import lora_torch is to be light"
import numpy as np
kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
state = lora_torch.to_torch_state_dict({"layers_0": {"kernel": kernel}}, preset="linen")
back = lora_torch.from_torch_state_dict(state, {"layers_0": {"kernel": kernel}}, preset="linen")
assert np.array_equal(back["layers_0"]["kernel"], kernel) and list(state) == ["layers.0.weight"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gpu_arrays_are_exchanged_without_a_copy(dtype) -> None:
    torch = pytest.importorskip("torch")
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        pytest.skip("needs one GPU that jax and torch both drive")
    params = {"scale": jax.block_until_ready(jnp.arange(4096, dtype=dtype))}
    state = to_torch_state_dict(params, kind="torch")
    assert state["weight"].is_cuda and state["weight"].data_ptr() == params["scale"].unsafe_buffer_pointer()
    back = from_torch_state_dict(state, params)
    assert back["scale"].unsafe_buffer_pointer() == params["scale"].unsafe_buffer_pointer()
    assert same_bits(back["scale"], params["scale"])
    kernel = {"kernel": jax.random.normal(jax.random.key(0), (8, 16), dtype)}
    weight = to_torch_state_dict(kernel, preset="linen", kind="torch")["weight"]
    assert weight.is_cuda and weight.is_contiguous() and same_bits(weight, kernel["kernel"].T)
    view = to_torch_state_dict(kernel, preset="linen", kind="torch", contiguous=False)["weight"]
    assert view.is_cuda and view.data_ptr() == kernel["kernel"].unsafe_buffer_pointer() and same_bits(view, weight)
    again = from_torch_state_dict({"weight": view}, kernel, preset="linen")["kernel"]
    assert again.unsafe_buffer_pointer() == kernel["kernel"].unsafe_buffer_pointer()
    host = from_torch_state_dict({"weight": weight.cpu()}, kernel, preset="linen")["kernel"]
    assert host.devices() == kernel["kernel"].devices() and same_bits(host, kernel["kernel"])
