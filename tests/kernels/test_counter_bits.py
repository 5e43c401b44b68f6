"""The bits that dropout masks are drawn from."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.counter_bits import bits16
from tests.kernels.problems import SEED, drawn, seed_words


def library_bits(shape, seed=SEED, origin=(0, 0)):
    words = jnp.asarray(seed_words(seed))
    rows, columns = np.indices(shape, dtype=np.int32)
    return np.asarray(bits16(words[0], words[1], jnp.asarray(rows + origin[0]), jnp.asarray(columns + origin[1])))


@pytest.mark.parametrize("seed", [SEED, (0, 0), (0xFFFFFFFF, 1)])
def test_formula(seed, strict_jax):
    got = library_bits((70, 300), seed)
    assert np.array_equal(got, drawn((70, 300), seed))
    assert not np.array_equal(got, drawn((70, 300), (seed[0] ^ 1, seed[1])))


@pytest.mark.parametrize("origin", [(3, 128), (1 << 20, 384)])
def test_a_block_has_the_bits_of_its_place(origin):
    whole = drawn((70 + 3, 300 + 128))
    part = library_bits((70, 300), origin=origin)
    assert np.array_equal(part, drawn((70, 300), origin=origin))
    assert np.array_equal(part, whole[3:, 128:]) == (origin == (3, 128))


def correlation(u: np.ndarray, v: np.ndarray) -> float:
    return abs(float(np.corrcoef(u.ravel(), v.ravel())[0, 1]))


def test_statistics():
    """Shares, bits, neighbours in every direction and other seeds, each within five standard errors."""
    shape = (512, 1024)
    bits = library_bits(shape)
    count = bits.size
    for rate in (0.05, 0.1, 0.5):
        share = np.mean(bits < round(rate * 65536))
        assert abs(share - rate) < 5 * (rate * (1 - rate) / count) ** 0.5
    for bit in range(16):
        assert abs(np.mean(bits >> bit & 1) - 0.5) < 2.5 / count**0.5
    # A kept share for each row and column: no row may be dropped together.
    dropped = bits < 6554
    for axis in (0, 1):
        means = dropped.mean(axis)
        expected = (0.1 * 0.9 / shape[axis]) ** 0.5
        assert 0.8 < np.std(means) / expected < 1.2
    limit = 5 / (count / 2) ** 0.5
    for rows, columns in ((1, 0), (0, 1), (1, 1), (0, 64), (0, 128), (64, 0), (128, 0)):
        assert correlation(bits[rows:, columns:], bits[: shape[0] - rows, : shape[1] - columns]) < limit, (
            rows,
            columns,
        )
    for other in ((SEED[0] + 1, SEED[1]), (SEED[0], SEED[1] + 1), (SEED[1], SEED[0])):
        assert correlation(bits, library_bits(shape, other)) < limit, other
    # What the checks above would see of a generator that forgets the row.
    assert correlation(np.broadcast_to(bits[:1], shape)[1:], np.broadcast_to(bits[:1], shape)[:-1]) > limit
