"""Tiles: what a kernel refuses, and that the table of tiles asks for nothing it refuses. No kernel runs."""

from __future__ import annotations

import re

import jax.numpy as jnp
import pytest

from lora_jax.kernels import mosaic_lora, tuned
from lora_jax.kernels.gemm_config import (
    K_TILE,
    SHARED_BYTES,
    GemmConfig,
    in_ring,
    padded_rank,
    rank_of,
    unsupported,
)

SHAPES = [
    (8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (2048, 2048, 8192), (16384, 8192, 8192),
    (8, 320, 320), (256, 448, 576), (1000, 576, 1536), (4096, 18944, 3584), (1 << 17, 2048, 128256),
]  # fmt: skip


@pytest.mark.parametrize("rank, padded", [(1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (193, 256), (256, 256)])
def test_padded_rank(rank, padded):
    assert padded_rank(rank) == padded
    assert in_ring(padded) == (padded != 16)
    thin = (16, 8) if padded == 16 else (8, padded)
    assert rank_of(jnp.zeros(thin)) == padded


@pytest.mark.parametrize(
    "m, k, n, rank, changes, masked, message",
    [
        (1004, 1024, 1024, 16, {}, False, "M=1004 must be a multiple of 8"),
        (1024, 1000, 1024, 16, {}, False, "K=1000 and N=1024 of 64"),
        (1024, 1024, 1000, 16, {}, False, "N=1000 of 64"),
        (1024, 1024, 1024, 32, {}, False, "R=32 must be 16 or a multiple of 64"),
        (1024, 1024, 1024, 16, {"stages": 5}, False, r"needs \d+ bytes of shared memory, more than 231424"),
        (1024, 256, 1024, 16, {}, False, "K=256 is shorter than the ring of 4 stages of 64"),
        (1024, 1024, 1024, 256, {}, True, "a masked tail of R=256 fills the ring of 4 stages"),
        (1024, 1024, 1024, 64, {}, True, "a masked tail of R=64 is cut as it lies, in 64 columns, not 32"),
        (1024, 1024, 1024, 16, {"delay": 2}, False, "at most one product is left in flight"),
        (1024, 1024, 1024, 64, {"tile_m": 64, "tile_n": 192, "store_n": 64}, False, "use each slot equally often"),
    ],
)
def test_refusals(m, k, n, rank, changes, masked, message):
    reason = unsupported(m, k, n, rank, GemmConfig(**changes), masked=masked)
    assert reason is not None and re.search(message, reason)


@pytest.mark.parametrize("masked", [False, True])
def test_accepted(masked):
    assert unsupported(8, 320, 64, 16, GemmConfig(), masked=masked) is None
    assert unsupported(8, 320, 64, 192, GemmConfig(store_n=64), masked=masked) is None


def test_shared_bytes_counts_each_buffer():
    config = GemmConfig(tile_m=128, tile_n=128, stages=3, split="m", store_n=32)
    ring, store, tail = 3 * (256 + 128) * 64, 2 * 2 * 64 * 32, 16 * (256 + 128)
    assert config.shared_bytes(64) == 2 * (ring + store)
    assert config.shared_bytes(16) == 2 * (ring + store + tail)


@pytest.mark.parametrize("ranks", [range(i + 1, i + 65) for i in (0, 64, 128, 192)])
def test_tuned_fits(ranks):
    """Every result of the table, in both directions of a layer, with and without dropout."""
    for rank in ranks:
        check_tuned(rank, padded_rank(rank))


def check_tuned(rank, padded):
    for m, k, n in SHAPES:
        for contracted, out in ((k, n), (n, k)):
            for masked in (False, True):
                config = tuned.gemm_config(m, contracted, out, rank, dropped=masked)
                reason = unsupported(m, contracted, out, padded, config, masked=masked)
                assert reason is None or "shorter than the ring" in reason
                assert (reason is not None) == (contracted // K_TILE <= config.stages)
                assert config.tile_m % 64 == config.tile_n % config.store_n == 0
        for sms in (114, 132):
            check_thin(tuned.down_config(m, k, rank, sms), padded, m, k, rows=m)
            check_thin(tuned.outer_config(m, k, rank, sms), padded, m, k, rows=k)


def check_thin(config, padded, m, k, rows):
    assert config.shared_bytes(padded) <= SHARED_BYTES
    # Rules of `mosaic.drain`: a worker's slots are its own, and it gives one back only after starting the next.
    assert config.stages % config.workers == 0 and config.stages >= 2 * config.workers
    assert config.splits >= 1
    width = config.rows if isinstance(config, tuned.DownConfig) else config.columns
    # A worker's float32 result in registers: 128 threads, up to 128 registers each.
    assert width * padded <= 128 * 128
    assert width % 64 == 0


@pytest.mark.parametrize("rank", [1, 16, 17, 64, 128, 200, 256])
def test_lora_takes_ragged_sizes(rank):
    assert mosaic_lora.unsupported(1001, 1000, 1111, rank, jnp.bfloat16) is None
    assert mosaic_lora.unsupported(1001, 1000, 1111, rank, jnp.float16) is None


def test_lora_refusals():
    for sizes, dtype, message in (
        ((1024, 1024, 1024, 16), jnp.float32, "float32 operands"),
        ((1024, 1024, 1024, 257), jnp.bfloat16, "rank 257"),
        ((1024, 256, 1024, 16), jnp.bfloat16, "K=256 is shorter"),
        ((1024, 1024, 250, 16), jnp.bfloat16, "K=256 is shorter"),  # of the backward product, where N is contracted
    ):
        reason = mosaic_lora.unsupported(*sizes, dtype)
        assert reason is not None and message in reason
