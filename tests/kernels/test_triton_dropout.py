"""The bits that decide what dropout keeps."""

import numpy as np
import pytest

from lora_torch import triton_launch as launch

from .triton_problem import SEED, mask

torch = pytest.importorskip("torch")
pytest.importorskip("triton")


def kernel_mask(m: int, k: int, drop: launch.Drop) -> np.ndarray:
    """What `down` multiplies ones by: with `a` the identity, its result is the mask."""
    return launch.down(torch.ones(m, k), torch.eye(k), 1.0, drop).double().numpy()


@pytest.mark.parametrize("row,column", [(0, 0), (1000, 35), (2**31 + 5, 2**31 + 34)])
def test_bits_are_the_specified_ones(row: int, column: int) -> None:
    drop = launch.Drop.seeded(0.3, SEED, "cpu", row=row, column=column)
    want = mask(37, 45, 0.3, row=row, column=column)
    assert np.allclose(kernel_mask(37, 45, drop), want, rtol=1e-6, atol=0)
    # Neither another seed nor another place gives the same bits.
    assert not np.array_equal(want, mask(37, 45, 0.3, row=row, column=column, seed=(SEED[0], SEED[1] + 1)))
    assert not np.array_equal(want, mask(37, 45, 0.3, row=row + 1, column=column))
    assert not np.array_equal(want, mask(37, 45, 0.3, row=row, column=column + 2))


def test_a_shard_drops_what_the_whole_drops() -> None:
    whole = kernel_mask(40, 48, launch.Drop.seeded(0.5, SEED, "cpu"))
    shard = kernel_mask(20, 24, launch.Drop.seeded(0.5, SEED, "cpu", row=20, column=24))
    assert np.array_equal(whole[20:, 24:], shard)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_rate(rate: float) -> None:
    kept = (mask(400, 400, rate) > 0).mean()
    assert abs(kept - (1 - rate)) < 5 * (rate * (1 - rate) / 400**2) ** 0.5  # five standard deviations


def test_all_or_nothing() -> None:
    assert (kernel_mask(17, 18, launch.Drop.seeded(0.0, SEED, "cpu")) == 1).all()
    assert (kernel_mask(17, 18, launch.Drop.seeded(1.0, SEED, "cpu")) == 0).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"dropout rate 1\.5 is not between 0 and 1"):
        launch.Drop.seeded(1.5, SEED, "cpu")
