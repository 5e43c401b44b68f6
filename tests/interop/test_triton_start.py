"""The call that is repeated, by the launcher of the installed Triton on a stand-in for its C part."""

import logging
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from triton.backends.nvidia import driver  # noqa: E402

from lora_torch import triton_start  # noqa: E402

SIGNATURE = {"x": "tensordesc<bf16[64,64]>", "a": "*bf16", "bias": "*bf16", "m": "i32", "y": "tensordesc<bf16[64,64]>"}


class PyCUtensorMap:
    def __init__(self, address):
        self.address = address


@pytest.fixture
def calls(monkeypatch):
    """Those of the C part, as addresses and numbers."""
    encoded = []

    def encode(described, of):
        encoded.append(of)
        return [PyCUtensorMap(described.data_ptr()), *described.shape, *described.stride()]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    return SimpleNamespace(made=[], encoded=encoded)


def compiled(calls):
    launcher = driver.CudaLauncher.__new__(driver.CudaLauncher)
    vars(launcher).update(
        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1, num_ctas=1,
        launch_cooperative_grid=True, launch_pdl=False, arg_annotations="annotations", kernel_signature="signature",
    )  # fmt: skip
    launcher.launch = driver.wrap_handle_tensordesc(lambda *call: calls.made.append(call), SIGNATURE, ["of x", "of y"])
    metadata = SimpleNamespace(tensordesc_meta=["of x", "of y"])
    return SimpleNamespace(
        run=launcher, metadata=metadata, src=SimpleNamespace(signature=SIGNATURE), function=7, packed_metadata=(4, 1)
    )


def plain(call):
    """Every argument in one list, tensor maps and tensors by their address."""
    flat = [each for value in call for each in (value if isinstance(value, (list, tuple)) else [value])]
    return [
        each.address if isinstance(each, PyCUtensorMap) else each.data_ptr() if isinstance(each, torch.Tensor) else each
        for each in flat
    ]


def test_the_same_call_with_other_tensors(calls):
    kernel = compiled(calls)
    names = ["x", "a", None, None, "y"]
    old, new = ({name: torch.zeros(4, 8) for name in ("x", "a", "y")} for _ in range(2))
    old["a"] = old["x"]
    describe = {"x": lambda tensor: tensor, "y": lambda tensor: tensor}
    start = triton_start.recorded(kernel, 12, [old["x"], old["a"], None, 5, old["y"]], names, describe)
    assert start is not None and not calls.made
    one = new | {"a": new["x"]}  # a tensor that is two operands
    for tensors in (new, one, old, new):
        before = len(calls.encoded)
        start(tensors, 1)
        again = len(calls.encoded)
        kernel.run(12, 1, 1, 101, 7, (4, 1), None, None, None, tensors["x"], tensors["a"], None, 5, tensors["y"])
        mine, own = calls.made[-2:]
        assert plain(mine) == plain(own)
        assert calls.encoded[before:again] in (["of x", "of y"], [])
    assert calls.encoded[-2:] == ["of x", "of y"] and again == before  # kept by their addresses
    assert len({tuple(plain(call)) for call in calls.made}) == 3


def test_another_launcher(calls, caplog):
    kernel = compiled(calls)
    kernel.run.launch = lambda *call: None
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tensor = torch.zeros(4, 8)
            arguments = [tensor, tensor, None, 5, tensor]
            describe = {"x": lambda tensor: tensor, "y": lambda tensor: tensor}
            assert triton_start.recorded(kernel, 12, arguments, ["x", "a", None, None, "y"], describe) is None
    assert caplog.text.count("the launcher of this Triton is not known") == 1
