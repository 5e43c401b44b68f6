"""The call that is repeated, by the launcher of the installed Triton on a stand-in for its C part."""

import gc
import logging
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton  # noqa: E402
from triton.backends.nvidia import driver  # noqa: E402

from lora_torch import triton_start  # noqa: E402

SIGNATURE = {
    "x": "tensordesc<bf16[64,64]>", "a": "*bf16", "bias": "*bf16", "m": "i32", "n": "constexpr",
    "y": "tensordesc<bf16[64,64]>",
}  # fmt: skip
NAMES = ["x", "a", None, None, None, "y"]
TILES = {"swizzle": 1, "elem_size": 2, "elem_type": 9, "block_size": [64, 64], "fp4_padded": False}


class PyCUtensorMap:
    def __init__(self, address, *_):
        self.address = address


def described(tensor):
    shape, strides = list(tensor.shape), list(tensor.stride())
    return SimpleNamespace(
        base=tensor, shape=shape, strides=strides, padding="zero", round_f32_to_tf32=False, block_shape=[64, 64]
    )


@pytest.fixture
def encoded(monkeypatch):
    """The addresses of which a tensor map was made."""
    addresses = []

    def encode(address, *rest):
        addresses.append(address)
        return PyCUtensorMap(address)

    utils = SimpleNamespace(fill_tma_descriptor=encode, fill_tma_descriptor_tiled=encode)
    monkeypatch.setattr(type(triton.runtime.driver), "active", SimpleNamespace(utils=utils))
    monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    triton_start._maps.clear()
    monkeypatch.setattr(triton_start, "_told", set())
    return addresses


def compiled(made, **details):
    """A kernel whose calls of the C part are in `made`."""
    launcher = driver.CudaLauncher.__new__(driver.CudaLauncher)
    own = {
        "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0, "profile_scratch_align": 1,
        "num_ctas": 1, "launch_cooperative_grid": True, "launch_pdl": False, "gsan_enabled": False,
        "arg_annotations": "annotations", "kernel_signature": "signature",
    }  # fmt: skip
    vars(launcher).update(own | details)
    launcher.launch = driver.wrap_handle_tensordesc(lambda *call: made.append(call), SIGNATURE, [TILES, TILES])
    metadata, source = SimpleNamespace(tensordesc_meta=[TILES, TILES]), SimpleNamespace(signature=SIGNATURE)
    return SimpleNamespace(run=launcher, metadata=metadata, src=source, function=7, packed_metadata=(4, 1))


def tensors():
    return {name: torch.zeros(64, 64) for name in ("x", "a", "y")}


def recorded(kernel, old):
    arguments = [described(old["x"]), old["a"], None, 5, 3, described(old["y"])]
    return triton_start.recorded(kernel, 12, arguments, NAMES, {"x": described, "y": described})


def plain(call):
    """Every argument in one list, tensor maps and tensors by their address."""
    flat = [each for value in call for each in (value if isinstance(value, (list, tuple)) else [value])]
    return [
        each.address if isinstance(each, PyCUtensorMap) else each.data_ptr() if isinstance(each, torch.Tensor) else each
        for each in flat
    ]


def test_the_same_call_with_other_tensors(encoded):
    made, new, old = [], tensors(), tensors()
    kernel = compiled(made)
    one = new | {"a": new["x"]}  # a tensor that is two operands
    old["a"] = old["x"]
    start = recorded(kernel, old)
    assert start is not None and not made
    for operands in (new, one, old, new):
        start(operands, 1)
        x, y = described(operands["x"]), described(operands["y"])
        kernel.run(12, 1, 1, 101, 7, (4, 1), None, None, None, x, operands["a"], None, 5, 3, y)
        mine, own = made[-2:]
        assert plain(mine) == plain(own)
    assert len({tuple(plain(call)) for call in made}) == 3


def test_tensor_maps_are_kept_by_address(encoded, monkeypatch):
    made, new, old = [], tensors(), tensors()
    start = recorded(compiled(made), old)
    other = recorded(compiled(made), old)  # a launch of another kind, whose operands lie alike
    assert start is not None and other is not None
    start(new, 0)
    del encoded[:]
    start(new, 0)
    other(new, 0)
    assert encoded == []
    monkeypatch.setattr(triton_start, "KEPT", 4)
    for _ in range(9):
        start(tensors(), 0)
    assert sum(map(len, triton_start._maps.values())) <= 4
    del start, other
    gc.collect()
    assert not triton_start._maps


@pytest.mark.parametrize(
    "details,told",
    [
        ({"launch": lambda *call: None}, "not known"),
        ({"gsan_enabled": True}, "a sanitizer"),
        ({"global_scratch_size": 8}, "a kernel with memory"),
    ],
)
def test_another_launcher(encoded, caplog, details, told):
    kernel = compiled([])
    vars(kernel.run).update(details)
    with caplog.at_level(logging.WARNING):
        assert recorded(kernel, tensors()) is None and recorded(kernel, tensors()) is None
    assert caplog.text.count("launches take microseconds more") == 1 and told in caplog.text
