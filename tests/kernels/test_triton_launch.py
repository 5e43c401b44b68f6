"""A whole adapted layer from the launched kernels, and what the launcher refuses."""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from lora_jax import reference  # noqa: E402
from lora_torch import triton_launch as launch  # noqa: E402
from lora_torch import triton_product  # noqa: E402

from .triton_problem import SCALE, SEED, mask, operands  # noqa: E402


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_a_layer_and_its_gradients(rate: float) -> None:
    m, k, n, r = 50, 40, 36, 6
    v = operands("float32", m, k, n, r)
    x, w, a, b, dy = (v[name] for name in ("x", "w", "a", "b", "dy"))
    drop = launch.Drop.seeded(rate, SEED, "cpu") if rate else None
    h = launch.down(x, a, SCALE, drop)
    g = launch.down(dy, b.T, SCALE)
    got = {
        "x": launch.input_gradient(dy, w, g, a, drop),
        "a": launch.outer(g, x, drop).T,
        "b": launch.outer(h, dy),
    }
    arrays = [t.numpy() for t in (x, w, a, b)]
    keep = mask(m, k, rate)
    want, magnitude = reference.lora_dot(*arrays, SCALE, keep)
    bound = reference.tolerance("float32", k + r) * magnitude
    assert reference.excess(launch.forward(x, w, h, b).numpy(), want, bound) <= 1
    assert reference.excess((x @ w).numpy(), want, bound) > 1
    wanted = reference.lora_dot_gradients(*arrays, SCALE, dy.numpy(), keep)
    for name, gradient in got.items():
        want, magnitude = wanted[name]
        bound = reference.tolerance("float32", m + n + k + r) * magnitude
        assert reference.excess(gradient.numpy(), want, bound) <= 1, name
        assert reference.excess((gradient / SCALE).numpy(), want, bound) > 1, name


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_a_bias_with_gaps(rate: float) -> None:
    v = operands("float32", 4, 8, 12, 2)
    drop = launch.Drop.seeded(rate, SEED, "cpu") if rate else None
    wide = v["bias"].repeat_interleave(2)
    wide[1::2] = 9
    for call in (launch.forward, triton_product.product, lambda x, w, *rest: launch.up(*rest)):
        rest = v["x"], v["w"], v["h"], v["b"]
        assert torch.allclose(call(*rest, wide[::2], drop), call(*rest, None, drop) + v["bias"], atol=1e-5)


def test_shapes_are_checked() -> None:
    v = operands("float32", 4, 8, 12, 2)
    with pytest.raises(ValueError, match=r"dimension 1 of `x` and dimension 0 of `a` differ.*\(4, 8\).*\(12, 2\)"):
        launch.down(v["x"], v["b"].T)
    with pytest.raises(ValueError, match="dimension 1 of `h` and dimension 0 of `b` differ"):
        launch.forward(v["x"], v["w"], v["h"], v["w"])
    with pytest.raises(ValueError, match=r"`x` has shape \(1, 4, 8\): flatten it to two dimensions first"):
        launch.down(v["x"][None], v["a"])
    with pytest.raises(ValueError, match="rank=257: the Triton kernels take ranks from 1 to 256"):
        launch.down(v["x"], torch.ones(8, 257))


def test_dtypes_are_checked() -> None:
    v = operands("float32", 4, 8, 12, 2)
    with pytest.raises(TypeError, match=r"`a` is torch.float16 but `x` is torch.float32: cast one of them"):
        launch.down(v["x"], v["a"].half())
    with pytest.raises(TypeError, match=r"`x` is torch.float64: the Triton kernels take float32, float16 and bfloat16"):
        launch.down(v["x"].double(), v["a"].double())
    with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 wrongly"):
        launch.down(v["x"].bfloat16(), v["a"].bfloat16())


def test_neither_triton_nor_a_gpu() -> None:
    code = """
import sys, torch
from lora_torch.triton_launch import down
sys.modules["triton"] = None
for _ in range(2):
    try:
        down(torch.ones(2, 8), torch.ones(8, 2))
    except Exception as error:
        print(type(error).__name__, error)
    del sys.modules["triton"]
    import triton
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    without_triton, without_gpu = done.stdout.splitlines()
    assert without_triton == "ModuleNotFoundError the Triton kernels need triton: install `lora-jax[triton]`"
    assert without_gpu.startswith("RuntimeError `x` is on cpu, and the Triton kernels need a CUDA GPU. Move the")
    assert "set TRITON_INTERPRET=1 before the first import of triton" in without_gpu
