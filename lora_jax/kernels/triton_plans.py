"""What to launch for given operands: how many programs of which kernel, with which tiles and which numbers.

For everyone who launches the Triton kernels, from PyTorch or from JAX. Plain data: imports none of triton, torch, jax.

Letters, as in the kernel files:
    M tokens    K input features    N output features    R rank
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from lora_jax.kernels.triton_configs import (
    ADAPTED,
    LEAST_SHARED_BYTES,
    GemmConfig,
    HopperConfig,
    PassConfig,
    down_config,
    gemm_config,
    outer_config,
    padded,
    up_config,
)

STEPS = 65536  # of a dropout rate: what 16 bits tell apart
# Of `hopper_adapted`: the largest rank, and in how many shares at most a row's `h` is summed.
ADAPTED_RANK = 16
ADAPTED_SHARES = 8


@dataclass(frozen=True)
class Matrix:
    """An operand as it lies in memory, strides in elements. `tma`: the device copies tiles by descriptor from there."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    itemsize: int
    tma: bool = False

    @classmethod
    def row_major(cls, rows: int, columns: int, itemsize: int, *, tma: bool = False) -> Matrix:
        return cls((rows, columns), (columns, 1), itemsize, tma)

    @property
    def T(self) -> Matrix:
        (rows, columns), (row, column) = self.shape, self.strides
        return Matrix((columns, rows), (column, row), self.itemsize, self.tma)

    @property
    def describable(self) -> bool:
        """Whether a descriptor can be made: 16-bit elements, rows contiguous and at multiples of 16 bytes."""
        row, column = self.strides
        fits = column == 1 and row >= self.shape[1] and row * self.itemsize % 16 == 0
        return self.tma and self.itemsize == 2 and fits


@dataclass(frozen=True)
class Launch:
    """One launch of `<kernel>_kernel` in `triton_<kernel>.py`.

    **Fields:**

    - `programs`: the grid, of one dimension.
    - `out`: the parameter that takes the result's pointer.
    - `numbers`: every parameter that is no pointer, by name.
    - `parts`: if not 1, the result is so many float32 partial sums, one after the other, that `total` adds.
    - `blocks`: the shapes of tiles by the parameters that take descriptors; empty where all take pointers.
    - `space`: int32 zeros that the kernel wants for itself.
    - `together`: whether programs wait for each other, so that all must be on the GPU at once.
    """

    kernel: str
    programs: int
    out: str
    numbers: dict[str, int | float]
    warps: int
    stages: int
    parts: int = 1
    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    space: int = 0
    together: bool = False


def rescaling(threshold: int) -> float:
    """What kept elements are multiplied by, where 16-bit numbers below `threshold` mean "drop"."""
    return STEPS / (STEPS - threshold) if threshold < STEPS else 0.0


@functools.lru_cache(1024)  # on the way of each launch from PyTorch
def down(
    x: Matrix, a: Matrix, scale: float, threshold: int, sms: int, *, config: PassConfig | None = None
) -> Launch:  # fmt: skip
    """`scale * drop(x) @ a`: (M, K), (K, R) -> (M, R), row-major. `threshold` 0: no dropout."""
    (m, k), r, tma = x.shape, a.shape[1], x.describable
    config = config or down_config(m, k, r, x.itemsize, tma=tma, dropout=threshold > 0)
    row_blocks = blocks_of(m, config.rows)
    parts = config.split(row_blocks, blocks_of(k, config.columns), sms)
    numbers = {
        "scale": scale * rescaling(threshold), "threshold": threshold, "M": m, "K": k,
        **_strides("x", "mk", x), **_strides("a", "kr", a), "stride_hs": m * r, "stride_hm": r, "stride_hr": 1,
        "R": r, "RP": padded(r), "BM": config.rows, "BK": config.columns,
    }  # fmt: skip
    return _pass("down", "h_ptr", "x_ptr", row_blocks, parts, numbers, config, tma=tma)


@functools.lru_cache(1024)
def outer(
    t: Matrix, v: Matrix, threshold: int, sms: int, *, transposed: bool = False, config: PassConfig | None = None
) -> Launch:
    """`t.T @ drop(v)`: (M, R), (M, C) -> (R, C) in float32, row-major; (C, R) if `transposed`."""
    (m, r), c, tma = t.shape, v.shape[1], v.describable
    config = config or outer_config(m, c, r, v.itemsize, tma=tma, dropout=threshold > 0)
    column_blocks = blocks_of(c, config.columns)
    parts = config.split(column_blocks, blocks_of(m, config.rows), sms)
    of_rank, of_column = (1, r) if transposed else (c, 1)
    numbers = {
        "scale": rescaling(threshold), "threshold": threshold, "M": m, "C": c,
        **_strides("t", "mr", t), **_strides("v", "mc", v),
        "stride_os": r * c, "stride_or": of_rank, "stride_oc": of_column,
        "R": r, "RP": padded(r), "BM": config.rows, "BC": config.columns,
    }  # fmt: skip
    return _pass("outer", "out_ptr", "v_ptr", column_blocks, parts, numbers, config, tma=tma)


@functools.lru_cache(1024)
def up(
    h: Matrix, b: Matrix, t: Matrix, threshold: int, *, bias: bool = False, config: PassConfig | None = None
) -> Launch:  # fmt: skip
    """`drop(h @ b) (+ bias)`: (M, R), (R, N), (N,) -> (M, N); the mask is one of the result."""
    (m, r), n = h.shape, b.shape[1]
    config = config or up_config(r, h.itemsize)
    numbers = {
        "scale": rescaling(threshold), "threshold": threshold, "M": m, "N": n,
        **_strides("h", "mr", h), **_strides("b", "rn", b), **_strides("t", "mn", t),
        "R": r, "RP": padded(r), "BM": config.rows, "BN": config.columns, "BIAS": bias, "DROP": threshold > 0,
    }  # fmt: skip
    tiles = blocks_of(m, config.rows) * blocks_of(n, config.columns)
    return Launch("up", tiles, "t_ptr", numbers, config.warps, config.stages)


@functools.lru_cache(1024)
def gemm(
    x: Matrix, w: Matrix, h: Matrix, b: Matrix, y: Matrix, threshold: int, sms: int,
    *, bias: bool = False, shared: int = LEAST_SHARED_BYTES, config: GemmConfig | None = None,
) -> Launch:  # fmt: skip
    """`x @ w + drop(h @ b) (+ bias)`: (M, K), (K, N), (M, R), (R, N), (N,) -> (M, N); the mask is one of `y`.

    `shared`: bytes of shared memory that a program may have.
    """
    (m, k), n, r = x.shape, w.shape[1], h.shape[1]
    config = config or gemm_config(m, n, r, x.itemsize, shared=shared)
    tiles = blocks_of(m, config.bm) * blocks_of(n, config.bn)
    numbers = {
        "tail_scale": rescaling(threshold), "threshold": threshold, "M": m, "N": n, "K": k,
        **_strides("x", "mk", x), **_strides("w", "kn", w), **_strides("h", "mr", h), **_strides("b", "rn", b),
        **_strides("y", "mn", y),
        "R": r, "RP": padded(r), "BM": config.bm, "BN": config.bn, "BK": config.bk, "GROUP": config.group,
        "CHUNKS": config.chunks, "PREFETCH": config.prefetch(padded(r), x.itemsize),
        "BIAS": bias, "DROP": threshold > 0,
    }  # fmt: skip
    programs = min(tiles, config.per_sm * sms) if config.per_sm else tiles
    return Launch("gemm", programs, "y_ptr", numbers, config.warps, config.stages)


def hopper_fits(x: Matrix, w: Matrix, h: Matrix, b: Matrix) -> bool:
    """Whether `hopper_gemm` can take these operands: all by descriptors, `w` and `b` lying the same way."""
    rights = (w.T, b.T) if _transposed(w) else (w, b)
    y = Matrix.row_major(x.shape[0], w.shape[1], x.itemsize, tma=x.tma)
    return all(each.describable for each in (x, *rights, h, y))


@functools.lru_cache(1024)
def hopper_gemm(
    x: Matrix, w: Matrix, h: Matrix, b: Matrix, sms: int, *, bias: bool = False, config: HopperConfig | None = None
) -> Launch:  # fmt: skip
    """`x @ w + h @ b (+ bias)` on Hopper. Descriptors of `w` and `b` are those of their transposes if `W_T`."""
    config, r = config or HopperConfig(), h.shape[1]
    numbers, blocks, tiles = _hopper(x, w, bias, config)
    numbers |= {"tail_steps": blocks_of(r, config.bk), "TAIL": config.tail(r)}
    blocks["h_ptr"] = blocks["x_ptr"]
    return Launch("hopper_gemm", min(tiles, sms), "y_ptr", numbers, warps=4, stages=1, blocks=blocks)


def hopper_adapted_fits(x: Matrix, w: Matrix, a: Matrix, b: Matrix) -> bool:
    """Whether `hopper_adapted` can take these operands: ranks up to 16, and all that `hopper_fits` wants."""
    right = (a.T if _transposed(w) else a).describable
    return a.shape[1] <= ADAPTED_RANK and right and hopper_fits(x, w, x, b)


@functools.lru_cache(1024)
def hopper_adapted(
    x: Matrix, w: Matrix, a: Matrix, b: Matrix, scale: float, sms: int,
    *, bias: bool = False, config: HopperConfig | None = None,
) -> Launch:  # fmt: skip
    """`h = scale * x @ a`, (M, R), and `x @ w + h @ b (+ bias)`. Descriptors as of `hopper_gemm`, and of `a` too."""
    config = config or ADAPTED
    numbers, blocks, tiles = _hopper(x, w, bias, config)
    rows = blocks_of(x.shape[0], config.bm)
    # So many that all of their tiles run at once, if more than one.
    first_columns = max(1, min(sms // rows, tiles // rows, blocks_of(x.shape[1], config.bk), ADAPTED_SHARES))
    numbers |= {"scale": scale, "R": a.shape[1], "first_columns": first_columns}
    blocks["a_ptr"] = (ADAPTED_RANK, config.bk) if numbers["W_T"] else (config.bk, ADAPTED_RANK)
    space = 2 * rows + 4 + (first_columns * rows * config.bm * ADAPTED_RANK if first_columns > 1 else 0)
    return Launch(
        "hopper_adapted", min(tiles, sms), "y_ptr", numbers, warps=4, stages=1, blocks=blocks,
        space=space, together=True,
    )  # fmt: skip


def _hopper(
    x: Matrix, w: Matrix, bias: bool, config: HopperConfig
) -> tuple[dict[str, int | float], dict[str, tuple[int, int]], int]:
    """Of both kernels for Hopper: numbers, blocks that go by descriptors, and how many tiles there are."""
    (m, k), n, transposed = x.shape, w.shape[1], _transposed(w)
    right = (config.bn, config.bk) if transposed else (config.bk, config.bn)
    numbers: dict[str, int | float] = {
        "M": m, "N": n, "steps": blocks_of(k, config.bk), "BM": config.bm, "BN": config.bn, "BK": config.bk,
        "GROUP": config.group, "STAGES": config.stages, "CHUNKS": config.chunks, "BUFFERS": config.buffers,
        "BIAS": bias, "W_T": transposed,
    }  # fmt: skip
    blocks = {
        "x_ptr": (config.bm // 2, config.bk), "w_ptr": right, "b_ptr": right,
        "y_ptr": (config.bm // 2, config.bn // config.chunks),
    }  # fmt: skip
    return numbers, blocks, blocks_of(m, config.bm) * blocks_of(n, config.bn)


def _transposed(w: Matrix) -> bool:
    return w.strides[0] == 1 != w.strides[1]


def total(size: int, parts: int) -> Launch:
    """The sum of `parts` partial sums of `size` elements."""
    return Launch("sum", blocks_of(size, 1024), "out_ptr", {"size": size, "PARTS": parts, "BLOCK": 1024}, 4, 3)


def blocks_of(size: int, block: int) -> int:
    return -(-size // block)


def _pass(
    kernel: str, out: str, read: str, programs: int, parts: int, numbers: dict[str, int | float], config: PassConfig,
    *, tma: bool,
) -> Launch:  # fmt: skip
    """`read`: the large operand. `config.tma` may decide against descriptors."""
    tma &= config.tma
    numbers |= {"SPLIT": parts, "DROP": numbers["threshold"] > 0, "TMA": tma}
    blocks = {read: (config.rows, config.columns)} if tma else {}
    return Launch(kernel, programs * parts, out, numbers, config.warps, config.stages, parts, blocks)


def _strides(name: str, axes: str, matrix: Matrix) -> dict[str, int]:
    return {f"stride_{name}{axis}": stride for axis, stride in zip(axes, matrix.strides, strict=True)}
