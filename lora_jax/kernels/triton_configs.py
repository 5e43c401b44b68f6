"""Tile sizes of the Triton kernels, and which to take for a shape. Plain data: imports neither triton nor jax.

Letters, the same in every kernel file:
    M tokens    K input features    N output features    R rank
"""

from __future__ import annotations

from dataclasses import dataclass

# What one program may hold: 48 registers a thread for a tail on its way, and so much shared memory, in bytes by compute
# capability. All others that the kernels are for have the least of these.
TAIL_REGISTERS = 48
SHARED_BYTES = {(8, 0): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}
LEAST_SHARED_BYTES = min(SHARED_BYTES.values())


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of `triton_gemm.gemm_kernel`. `per_sm`: persistent programs on a multiprocessor; 0: one program a tile."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    group: int = 8
    chunks: int = 1
    per_sm: int = 1

    def prefetch(self, rp: int, itemsize: int) -> bool:
        """Whether the registers can hold the tail's operands of padded rank `rp` during the walk over K."""
        return (self.bm + self.bn) * rp * itemsize <= TAIL_REGISTERS * 4 * 32 * self.warps


@dataclass(frozen=True)
class HopperConfig:
    """Tiles of the products for Hopper: a ring of `stages`, and `buffers` for the `chunks` that a half is stored in."""

    bm: int = 128
    bn: int = 256
    bk: int = 64
    stages: int = 4
    group: int = 12  # of 132 programs, 12 by 11 tiles then share the L2 cache
    chunks: int = 4
    buffers: int = 2

    def tail(self, r: int) -> int:
        """How deep the products of the tail's blocks are."""
        return next((depth for depth in (16, 32) if r <= depth < self.bk), self.bk)


# Of `hopper_adapted_kernel`: its ring's blocks of `a` are where `hopper_gemm_kernel` has second buffers.
ADAPTED = HopperConfig(buffers=1)


@dataclass(frozen=True)
class PassConfig:
    """Tiles of the memory-bound passes: `rows` tokens times `columns` features, read once.

    `per_sm`: programs to aim for on each multiprocessor; the reduction is split to get there.
    """

    rows: int
    columns: int
    stages: int
    warps: int
    per_sm: int = 2
    tma: bool = True

    def split(self, blocks: int, steps: int, sms: int) -> int:
        """In how many parts to do a reduction of `steps` steps when there are `blocks` independent programs."""
        return max(1, min(self.per_sm * sms // max(1, blocks), steps // 2))  # no blocks: no tokens


# The candidates of `benchmarks/triton_kernels.py` and `benchmarks/triton_from_jax.py`.
GEMM = (
    GemmConfig(128, 256, 64, stages=3, warps=8, chunks=4),
    GemmConfig(128, 256, 64, stages=3, warps=8, chunks=4, per_sm=0),
    GemmConfig(128, 128, 64, stages=4, warps=8, chunks=2, per_sm=0),
    GemmConfig(128, 256, 32, stages=4, warps=8, chunks=2, per_sm=0),
    GemmConfig(128, 128, 32, stages=3, warps=8, per_sm=0),
)
DOWN = (
    PassConfig(64, 128, stages=4, warps=4),
    PassConfig(64, 128, stages=4, warps=4, tma=False),
    PassConfig(32, 256, stages=4, warps=4, tma=False),
    PassConfig(64, 256, stages=3, warps=8),
    PassConfig(128, 128, stages=3, warps=8),
    PassConfig(128, 64, stages=4, warps=4, per_sm=3),
)
OUTER = (
    PassConfig(64, 128, stages=4, warps=4),
    PassConfig(64, 128, stages=4, warps=4, tma=False),
    PassConfig(32, 256, stages=4, warps=4, tma=False),
    PassConfig(64, 256, stages=3, warps=8),
    PassConfig(128, 128, stages=3, warps=4),
    PassConfig(64, 64, stages=4, warps=4, per_sm=4),
)

# float32 is multiplied without the matrix unit, so that it keeps its precision: small tiles, any GPU.
_GEMM_32 = GemmConfig(64, 64, 16, stages=3, warps=8, per_sm=0)
_PASS_32 = PassConfig(32, 32, stages=3, warps=4, tma=False)


def padded(r: int) -> int:
    """The rank that a kernel computes with: a power of two, and at least the 16 of the matrix unit."""
    if not 1 <= r <= 256:
        raise ValueError(f"rank={r}: the Triton kernels take ranks from 1 to 256")
    return max(16, 1 << (r - 1).bit_length())


def gemm_config(m: int, n: int, r: int, itemsize: int, *, shared: int = LEAST_SHARED_BYTES) -> GemmConfig:
    """Tiles for an (m, n) result with a tail of rank `r`, elements of `itemsize` bytes, as `shared` bytes allow."""
    if itemsize == 4:
        return _GEMM_32
    if m <= 128 or n <= 128:
        return GemmConfig(64, 64, 64, stages=3, warps=4, per_sm=0)
    if shared >= SHARED_BYTES[9, 0]:
        # Of a plain product with the first of these tiles XLA's is no faster (4096 x 4096 x 4096 on one H200).
        return GEMM[2 if m * n <= 128 * 256 * 132 // 2 or padded(r) > 64 else 0]
    return GemmConfig(128, 128, 32, stages=3, warps=8, per_sm=0, chunks=2 if padded(r) > 64 else 1)


def down_config(m: int, k: int, r: int, itemsize: int, *, tma: bool, dropout: bool = False) -> PassConfig:
    """Tiles for `(m, k) x (k, r)`. `tma`: by descriptors, on Hopper."""
    if itemsize == 4:
        return _PASS_32
    if not tma:
        return PassConfig(64, 32 if padded(r) >= 128 else 64, stages=3, warps=4, tma=False)
    # By pointers up to there: as fast, and a descriptor costs its launch more time than the kernel runs on few tokens.
    return PassConfig(128, 64, stages=3, warps=8) if padded(r) >= 128 else DOWN[1]


def outer_config(m: int, c: int, r: int, itemsize: int, *, tma: bool, dropout: bool = False) -> PassConfig:
    """Tiles for `(m, r).T x (m, c)`; the rest as `down_config`."""
    if itemsize == 4:
        return _PASS_32 if padded(r) < 128 else PassConfig(16, 32, stages=2, warps=8, tma=False)
    if not tma:
        return PassConfig(32, 64 if padded(r) >= 128 else 128, stages=3, warps=4, tma=False)
    return PassConfig(64, 128, stages=3, warps=8) if padded(r) >= 128 else OUTER[1]


def up_config(r: int, itemsize: int) -> PassConfig:
    """Tiles of `triton_up.up_kernel`, which writes them whole: nothing is split, nor goes by descriptor."""
    if itemsize == 4:
        return PassConfig(32, 32, stages=1, warps=4, tma=False)
    return PassConfig(64, 128 if padded(r) <= 64 else 64, stages=1, warps=4, tma=False)
