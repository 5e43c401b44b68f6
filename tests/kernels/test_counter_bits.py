"""The bits that dropout masks are drawn from."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.counter_bits import bits16
from tests.kernels.problems import SEED, drawn, mixed, seed_words


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


@pytest.mark.pinned
def test_no_two_columns_and_no_two_rows_are_dropped_together():
    """All pairs at a low rate, with a seed of zeros, where the keys of columns are in many a small ratio."""
    shape, rate = (4096, 2048), 0.05

    def furthest(bits: np.ndarray) -> float:
        """Of all pairs of columns, in standard errors."""
        v = ((bits < round(rate * 65536)) - rate).astype(np.float32) / (rate * (1 - rate)) ** 0.5
        return float(np.abs(np.triu(v.T @ v, 1)).max()) / shape[0] ** 0.5

    assert furthest(drawn(shape, (0, 0))) < 8
    assert furthest(drawn(shape[::-1], (0, 0)).T) < 8
    # What the check sees if a row adds nothing of its own to the product of the keys but the row's key once more.
    rows, columns = np.arange(shape[0], dtype=np.uint32), np.arange(shape[1], dtype=np.uint32)
    a = mixed(rows * np.uint32(0x9E3779B9))[:, None]
    v = (columns // np.uint32(128) * np.uint32(64) + columns % np.uint32(64)) * np.uint32(0x85EBCA6B)
    w = (a | np.uint32(1)) * ((v ^ v >> np.uint32(16)) * np.uint32(0xC2B2AE35) | np.uint32(1)) + a
    factor = np.where(columns & 64, np.uint32(0x27D4EB2F), np.uint32(0xC2B2AE35))
    assert furthest((w ^ w >> np.uint32(16)) * factor >> np.uint32(16)) > 8
