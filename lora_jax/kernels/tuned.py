"""Which tiles for which shape, as measured. Plain numbers: nothing of Pallas."""

from __future__ import annotations

from lora_jax.kernels.gemm_config import SHARED_BYTES, GemmConfig, in_ring, padded_rank
from lora_jax.kernels.mosaic_down import DownConfig
from lora_jax.kernels.mosaic_outer import OuterConfig


def gemm_config(m: int, k: int, n: int, rank: int, *, dropped: bool = False) -> GemmConfig:
    # A masked tail is cut where the weight's swizzle allows it, every 64 columns, and keeps its slots until the tile is
    # stored: four of the ring's for a rank of 256.
    if dropped and in_ring(padded_rank(rank)):
        return GemmConfig(tile_m=64, stages=6, store_n=64) if rank > 128 else GemmConfig(store_n=64)
    return GemmConfig()


def down_config(m: int, k: int, rank: int, sms: int) -> DownConfig:
    for stages, depth, workers in ((6, 128, 2), (4, 128, 2), (4, 64, 2), (2, 64, 1)):
        # Few rows leave most of the chip idle: K is cut too, down to four steps each.
        splits = max(1, min(sms // -(-m // 64), -(-k // depth) // 4))
        config = DownConfig(stages=stages, depth=depth, workers=workers, splits=splits)
        if config.shared_bytes(padded_rank(rank)) <= SHARED_BYTES:
            return config
    raise AssertionError(rank)


def outer_config(m: int, k: int, rank: int, sms: int) -> OuterConfig:
    # The accumulator of a worker is columns x rank: 128 registers a thread at most.
    columns = 128 if padded_rank(rank) <= 128 else 64
    splits = max(1, min(round(sms / -(-k // columns)), -(-m // 512)))
    for stages, workers in ((8, 2), (6, 2), (4, 2), (2, 1)):
        config = OuterConfig(columns=columns, stages=stages, workers=workers, splits=splits)
        if config.shared_bytes(padded_rank(rank)) <= SHARED_BYTES:
            return config
    raise AssertionError(rank)
