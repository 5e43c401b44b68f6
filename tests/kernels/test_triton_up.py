"""`t = mask / (1 - rate) * (h @ b) + bias`, the adapter's part of a layer alone."""

import pytest

from lora_torch import triton_launch as launch

from .triton_problem import SEED, assert_close, mask, operands

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("m,n,r", [(1, 16, 1), (70, 133, 5), (72, 104, 70)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_it_matches_float64(dtype: str, m: int, n: int, r: int, rate: float) -> None:
    v = operands(dtype, m, 16, n, r)
    drop = launch.Drop.seeded(rate, SEED, "cpu") if rate else None
    got = launch.up(v["h"], v["b"], v["bias"], drop)
    assert got.shape == (m, n) and got.dtype == getattr(torch, dtype)
    keep = mask(m, n, rate)

    def product(v):
        return keep * (v["h"] @ v["b"]) + v["bias"]

    for wrong in (lambda v: v["bias"] + 0 * product(v), lambda v: product(v) - v["bias"], lambda v: 1.5 * product(v)):
        assert_close(got, product, v, r + 1, wrong)


def test_no_tokens() -> None:
    assert launch.up(torch.ones(0, 4), torch.ones(4, 8)).shape == (0, 8)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="dimension 1 of `h` and dimension 0 of `b` differ"):
        launch.up(torch.ones(3, 4), torch.ones(5, 8))
