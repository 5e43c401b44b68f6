"""How `mosaic_gemm` cuts its output into tiles, and what it can't take. Plain numbers: nothing of Pallas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

K_TILE = 64  # elements: 128 bytes, the widest swizzle
# Of 228 KiB an SM, one is the system's and barriers take a little.
SHARED_BYTES = 226 * 1024


@dataclass(frozen=True)
class GemmConfig:
    """How the output is cut into tiles, and who works on which."""

    tile_m: int = 128  # of one of the two multiplying warpgroups
    tile_n: int = 128
    stages: int = 4
    # "m" or "n": the two multiplying warpgroups share a tile, side by side in this direction. "": they take turns,
    # each with a tile of its own, so that one multiplies while the other stores.
    split: str = "m"
    cluster: str = "n"  # direction in which two CTAs lie and share the other operand; "" for none
    minor: str = "m"  # direction that the tile order runs along first
    width: int = 8  # tiles before it turns
    store_n: int = 32  # columns stored at a time
    delay: int = 1  # products left in flight

    @property
    def cta(self) -> tuple[int, int]:
        return self.tile_m * (1 + (self.split == "m")), self.tile_n * (1 + (self.split == "n"))

    @property
    def block(self) -> tuple[int, int]:
        """Output of one cluster."""
        m, n = self.cta
        return m * (1 + (self.cluster == "m")), n * (1 + (self.cluster == "n"))

    @property
    def takes_turns(self) -> bool:
        return self.split == ""

    @property
    def store_slots(self) -> int:
        return min(2, self.tile_m * self.tile_n // (64 * self.store_n))

    def shared_bytes(self, rank: int) -> int:
        m, n = self.cta
        ring = (m + n) * K_TILE * self.stages
        store = 2 * self.store_slots * 64 * self.store_n
        return 2 * (ring + store + (0 if in_ring(rank) else (m + n) * rank))


def in_ring(rank: int) -> bool:
    """Whether a tail of this padded rank passes through the ring, as steps like any other."""
    return rank % K_TILE == 0


def padded_rank(rank: int) -> int:
    """16 or the next multiple of 64."""
    return 16 if rank <= 16 else -(-rank // 64) * 64


def rank_of(thin: Any) -> int:
    """The padded rank of a thin operand: rank-major for 16 (rows are never so few), else by rows."""
    return 16 if thin.shape[0] == 16 else thin.shape[1]


def unsupported(
    m: int, k: int, n: int, rank: int, config: GemmConfig, *, masked: bool = False, run: int | None = None
) -> str | None:
    """Why the kernel can't run, or None. `m`, `k`, `n`, `rank` as handed to it, padding included.

    `run`: rows of each tail, where there are several.
    """
    if m % 8 or k % K_TILE or n % K_TILE:
        return f"M={m} must be a multiple of 8, K={k} and N={n} of {K_TILE}"
    if rank and rank != padded_rank(rank):
        return f"R={rank} must be 16 or a multiple of 64"
    if config.shared_bytes(rank) > SHARED_BYTES:
        return f"{config} needs {config.shared_bytes(rank)} bytes of shared memory, more than {SHARED_BYTES}"
    if k // K_TILE <= config.stages:
        return f"K={k} is shorter than the ring of {config.stages} stages of {K_TILE}"
    if masked and in_ring(rank) and rank // K_TILE >= config.stages:
        return f"a masked tail of R={rank} fills the ring of {config.stages} stages"
    if masked and in_ring(rank) and config.store_n % K_TILE:
        return f"a masked tail of R={rank} is cut as it lies, in {K_TILE} columns, not {config.store_n}"
    if run is not None and (m % run or run % config.block[0]):
        return (
            f"runs of {run} of M={m} rows, each with a tail of its own; {config} takes multiples of {config.block[0]}"
        )
    if config.delay > 1 or (config.tile_m // 64 * (config.tile_n // config.store_n)) % config.store_slots:
        return f"{config}: at most one product is left in flight, and the stores of a tile use each slot equally often"
    return None
