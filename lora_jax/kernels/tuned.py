"""Which tiles for which shape, as measured. Plain numbers: nothing of Pallas."""

from __future__ import annotations

from lora_jax.kernels.gemm_config import SHARED_BYTES, GemmConfig, padded_rank
from lora_jax.kernels.mosaic_down import DownConfig
from lora_jax.kernels.mosaic_outer import OuterConfig


def gemm_config(m: int, k: int, n: int, rank: int, *, dropped: bool = False) -> GemmConfig:
    return GemmConfig()


def down_config(m: int, k: int, rank: int, *, dropped: bool = False) -> DownConfig:
    for stages in (8, 6, 4, 2):
        config = DownConfig(stages=stages)
        if config.shared_bytes(padded_rank(rank)) <= SHARED_BYTES:
            return config
    return DownConfig(stages=2, depth=64)


def outer_config(m: int, k: int, rank: int, sms: int, *, dropped: bool = False) -> OuterConfig:
    splits = max(1, min(round(sms / -(-k // 128)), -(-m // 512)))
    for stages in (8, 6, 4, 2):
        config = OuterConfig(stages=stages, splits=splits)
        if config.shared_bytes(padded_rank(rank)) <= SHARED_BYTES:
            return config
    return OuterConfig(columns=64, stages=2, splits=splits)
