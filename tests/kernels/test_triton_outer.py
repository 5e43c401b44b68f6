"""The factors' gradients: `outer(t, v) = t.T @ drop(v)`."""

import pytest

from lora_jax.kernels.triton_configs import PassConfig
from lora_torch import triton_launch as launch

from .triton_problem import SEED, assert_close, mask, operands

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("m,k,r", [(1, 16, 1), (70, 45, 5), (136, 72, 16), (40, 136, 70)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_matches_float64(dtype: str, m: int, k: int, r: int, rate: float) -> None:
    v = operands(dtype, m, k, 8, r)
    got = launch.outer(v["g"], v["x"], launch.Drop.seeded(rate, SEED, "cpu") if rate else None)
    keep = mask(m, k, rate)
    assert got.dtype == torch.float32
    assert_close(got, lambda v: v["g"].T @ (v["x"] * keep), v, m, lambda v: 0.99 * v["g"].T @ (v["x"] * keep))
    if rate:
        assert_close(got, lambda v: v["g"].T @ (v["x"] * keep), v, m, lambda v: v["g"].T @ v["x"])


def test_split_over_tokens() -> None:
    v = operands("float16", 200, 20, 8, 5)
    config = PassConfig(16, 16, stages=2, warps=4, per_sm=8, tma=False)
    assert config.split(2, 13, launch.sms(None)) == 6
    got = launch.outer(v["g"], v["x"], config=config)
    assert_close(got, lambda v: v["g"].T @ v["x"], v, 200, lambda v: v["g"][:192].T @ v["x"][:192])
    assert torch.equal(got, launch.outer(v["g"], v["x"], config=config))


def test_no_tokens() -> None:
    assert torch.equal(launch.outer(torch.ones(0, 2), torch.ones(0, 8)), torch.zeros(2, 8))
