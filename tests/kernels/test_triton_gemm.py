"""`y = x @ w + h @ b + bias`, and the same kernel as `dx = dy @ w.T + mask / (1 - rate) * (g @ a.T)`."""

import pytest

from lora_jax.kernels.triton_configs import GemmConfig
from lora_torch import triton_launch as launch

from .triton_problem import SEED, assert_close, mask, operands

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = [(1, 16, 16, 1), (70, 45, 33, 5), (72, 88, 104, 16), (33, 40, 72, 70)]


def forward(v):
    return v["x"] @ v["w"] + v["h"] @ v["b"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("m,k,n,r", SIZES)
def test_forward_matches_float64(dtype: str, m: int, k: int, n: int, r: int) -> None:
    v = operands(dtype, m, k, n, r)
    got = launch.forward(v["x"], v["w"], v["h"], v["b"], v["bias"])
    assert got.dtype == getattr(torch, dtype)
    for wrong in (lambda v: v["x"] @ v["w"] + v["bias"], lambda v: forward(v) + v["h"] @ v["b"], forward):
        assert_close(got, lambda v: forward(v) + v["bias"], v, k + r, wrong)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("m,k,n,r", SIZES)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_input_gradient_matches_float64(dtype: str, m: int, k: int, n: int, r: int, rate: float) -> None:
    v = operands(dtype, m, k, n, r)
    drop = launch.Drop.seeded(rate, SEED, "cpu") if rate else None
    got = launch.input_gradient(v["dy"], v["w"], v["g"], v["a"], drop)
    keep = mask(m, k, rate)

    def product(v):
        return v["dy"] @ v["w"].T + keep * (v["g"] @ v["a"].T)

    assert_close(got, product, v, n + r, lambda v: v["dy"] @ v["w"].T)
    if rate:
        assert_close(got, product, v, n + r, lambda v: v["dy"] @ v["w"].T + v["g"] @ v["a"].T)


# Several tiles a program, the last group of row blocks not full, each way to cut a tile, the tail before and after.
@pytest.mark.parametrize("chunks,r,rate", [(1, 16, 0.3), (2, 100, 0.3), (4, 100, 0.0), (4, 16, 0.3)])
def test_every_way_through_the_kernel(chunks: int, r: int, rate: float) -> None:
    m, k, n = 40, 36, 70
    config = GemmConfig(16, 64, 32, stages=2, warps=2, group=2, chunks=chunks)
    assert config.prefetch(16, 2) and not config.prefetch(128, 2)
    v = operands("float16", m, k, n, r)
    keep = mask(m, k, rate)
    y = launch.forward(v["x"], v["w"], v["h"], v["b"], config=config)
    assert_close(y, forward, v, k + r, lambda v: v["x"] @ v["w"])
    drop = launch.Drop.seeded(rate, SEED, "cpu") if rate else None
    dx = launch.input_gradient(v["dy"], v["w"], v["g"], v["a"], drop, config=config)
    assert_close(
        dx,
        lambda v: v["dy"] @ v["w"].T + keep * (v["g"] @ v["a"].T),
        v,
        n + r,
        lambda v: v["dy"] @ v["w"].T,
    )


def test_any_strides() -> None:
    v = operands("float16", 40, 48, 56, 8)
    wide = torch.full((96, 112), float("nan"), dtype=torch.float16)
    wide[::2, ::2] = v["w"]
    for w in (v["w"].contiguous(), wide[::2, ::2]):
        for x in (v["x"], v["x"].T.contiguous().T):
            got = launch.forward(x, w, v["h"].T.contiguous().T, v["b"].contiguous())
            assert_close(got, forward, v, 48 + 8, lambda v: v["x"] @ v["w"])


def test_no_tokens() -> None:
    v = operands("float32", 4, 8, 12, 2)
    assert launch.forward(v["x"][:0], v["w"], v["h"][:0], v["b"]).shape == (0, 12)
