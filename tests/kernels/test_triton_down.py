"""`h = scale * drop(x) @ a` and `g = scale * dy @ b.T`."""

import pytest

from lora_jax.kernels.triton_configs import PassConfig
from lora_torch import triton_launch as launch

from .triton_problem import SCALE, SEED, assert_close, mask, operands

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("poisoned")

SPLIT = PassConfig(16, 16, stages=2, warps=4, per_sm=8, tma=False)


# Odd sizes cross every tile edge by pointers, multiples of 8 by descriptors; ranks on both sides of the padding.
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("m,k,r", [(2, 40, 1), (70, 45, 5), (72, 200, 16), (33, 136, 70)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_matches_float64(dtype: str, m: int, k: int, r: int, rate: float) -> None:
    v = operands(dtype, m, k, 8, r)
    got = launch.down(v["x"], v["a"], SCALE, launch.Drop.seeded(rate, SEED, "cpu") if rate else None)
    keep = mask(m, k, rate)
    assert got.dtype == getattr(torch, dtype)
    assert_close(got, lambda v: SCALE * (v["x"] * keep) @ v["a"], v, k, lambda v: (v["x"] * keep) @ v["a"])
    if rate:
        assert_close(got, lambda v: SCALE * (v["x"] * keep) @ v["a"], v, k, lambda v: SCALE * v["x"] @ v["a"])


def test_the_gradient_is_the_same_pass() -> None:
    v = operands("float32", 40, 8, 72, 6)
    got = launch.down(v["dy"], v["b"].T, SCALE)
    assert_close(got, lambda v: SCALE * v["dy"] @ v["b"].T, v, 72, lambda v: v["dy"] @ v["b"].T)


def test_split_over_k() -> None:
    v = operands("float16", 20, 200, 8, 5)
    assert SPLIT.split(2, 13, launch.sms(None)) == 6  # 13 steps in 6 parts: the last has less to do
    got = launch.down(v["x"], v["a"], SCALE, config=SPLIT)
    assert_close(got, lambda v: SCALE * v["x"] @ v["a"], v, 200, lambda v: SCALE * v["x"][:, :96] @ v["a"][:96])
    assert torch.equal(got, launch.down(v["x"], v["a"], SCALE, config=SPLIT))


def test_strided_operands() -> None:
    v = operands("float32", 24, 40, 8, 4)
    wide = torch.full((48, 120), float("nan"))
    wide[::2, ::3] = v["x"]
    want = launch.down(v["x"], v["a"])
    for x in (wide[::2, ::3], v["x"].T.contiguous().T):
        assert torch.equal(launch.down(x, v["a"]), want)
    assert torch.equal(launch.down(v["x"], v["a"].contiguous()), want)


def test_no_tokens() -> None:
    assert launch.down(torch.ones(0, 8), torch.ones(8, 2)).shape == (0, 2)
