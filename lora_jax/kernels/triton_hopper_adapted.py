"""`h = scale * x @ a` and `y = x @ w + h @ b (+ bias)` on Hopper in one kernel, R <= 16: no pass of its own over `x`.

Letters, the same in every kernel file:
    M tokens    K input features    N output features    R rank

As `triton_hopper_gemm`, but for these:

    The tiles of the first columns come first, as many columns as fill the GPU once (`triton_plans.hopper_adapted`).
    Each sums its share of `h`, over a part of K, from the blocks of `x` that it multiplies anyway, writes it as float32
    and counts it. When all shares of its rows are counted it adds them up, always in the same order, rounds once, and
    multiplies the tail. Those of column 0 write `h`, which all later tiles read.

Tiles wait for each other: all programs must be on the GPU at once, which a cooperative launch asks for. It does not
begin while another kernel, of a communication say, keeps one multiprocessor.

The gradient of the input is the same kernel on other operands: `g = scale * dy @ b.T`, `dx = dy @ w.T + g @ a.T`.

Needs Triton 3.6 or later. Oracle: `lora_jax/reference.py`. Checked by: `tests/interop/test_product_gpu.py`; compiled by
`tests/kernels/test_triton_compiled.py`. Gluon has no interpreter.
"""

# Gluon's builtins say what they are to its compiler alone: the types that Python sees in them are not those.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from lora_jax.kernels.triton_hopper_stages import (
    add_bias,
    barriers,
    copy_block,
    copy_right,
    grouped,
    multiply,
    next_slot,
    right_of,
    slot_before,
    store,
)
from lora_jax.kernels.triton_plans import ADAPTED_RANK

RANK = gl.constexpr(ADAPTED_RANK)  # what R is filled up to, with zeros
sync_threads = getattr(gl, "barrier", None) or gl.thread_barrier  # since Triton 3.7, and before


@gluon.jit
def _place(tile, rows, columns, first_columns, GROUP: gl.constexpr):
    """Row and column of a tile, as blocks: the first columns one after the other, then the others in groups."""
    firsts = rows * first_columns
    if tile < firsts:
        row, column = tile % rows, tile // rows
    else:
        row, column = grouped(tile - firsts, rows, columns - first_columns, GROUP)
        column += first_columns
    return row, column


@gluon.jit
def _share(tile, column, rows, first_columns, steps):
    """The steps from which to which a tile sums `h`."""
    sums = tile < rows * first_columns
    first = gl.where(sums, column * steps // first_columns, 0)
    return first, gl.where(sums, (column + 1) * steps // first_columns, 0)


@gluon.jit
def _produce(
    x, w, a, b, xs, ws, thins, ready, empty, rows, columns, first_columns, steps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    W_T: gl.constexpr,
):  # fmt: skip
    SIZE: gl.constexpr = xs.dtype.primitive_bitwidth // 8
    slot = 0
    phase = 1  # a barrier that nothing has passed through lets this parity pass: the ring is empty
    for tile in range(gl.program_id(0), rows * columns, gl.num_programs(0)):
        row, column = _place(tile, rows, columns, first_columns, GROUP)
        lo, hi = _share(tile, column, rows, first_columns, steps)
        for step in range(0, steps):
            mbarrier.wait(empty.index(slot), phase)
            bar = ready.index(slot)
            if (step >= lo) & (step < hi):
                mbarrier.expect(bar, (BM + BN + RANK) * BK * SIZE)
                copy_right(a, thins, bar, slot, 0, step * BK, W_T)
            else:
                mbarrier.expect(bar, (BM + BN) * BK * SIZE)
            copy_block(x, w, xs, ws, bar, slot, row * BM, column * BN, step * BK, BM // 2, W_T)
            slot, phase = next_slot(slot, phase, STAGES)
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(ready.index(slot), BN * BK * SIZE)
        copy_right(b, ws, ready.index(slot), slot, column * BN, 0, W_T)
        slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply_both(
    acc, share, xs, ws, thins, ready, empty, slot, phase, steps,
    BK: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, W_T: gl.constexpr,
):  # fmt: skip
    """As `multiply`, and `share` plus the products with the blocks of `a`."""
    for step in range(0, steps):
        mbarrier.wait(ready.index(slot), phase)
        left = xs.index(2 * slot + PART)
        acc = warpgroup_mma(left, right_of(ws, slot, BK, W_T), acc, is_async=True)
        share = warpgroup_mma(left, right_of(thins, slot, BK, W_T), share, is_async=True)
        acc, share = warpgroup_mma_wait(num_outstanding=2, deps=(acc, share))
        mbarrier.arrive(empty.index(slot_before(slot, STAGES)), pred=step > 0)
        slot, phase = next_slot(slot, phase, STAGES)
    acc, share = warpgroup_mma_wait(num_outstanding=0, deps=(acc, share))
    mbarrier.arrive(empty.index(slot_before(slot, STAGES)), pred=steps > 0)
    return acc, share, slot, phase


@gluon.jit
def _count(counter):
    """What all threads have stored before is there for those that see the count."""
    sync_threads()
    gl.atomic_add(counter, 1, sem="release")


@gluon.jit
def _wait_for(counter, count):
    # An addition of zero becomes a load, which nothing after it overtakes.
    while gl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    sync_threads()


@gluon.jit
def _thin_at(row0, layout: gl.constexpr, ROWS: gl.constexpr):
    rows = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    ranks = gl.arange(0, RANK, gl.SliceLayout(0, layout))
    return rows[:, None], ranks[None, :]


@gluon.jit
def _read(h_ptr, row0, M, here, R: gl.constexpr, layout: gl.constexpr, ROWS: gl.constexpr):
    """Rows of `h`, filled up with zeros; zeros unless `here`."""
    rows, ranks = _thin_at(row0, layout, ROWS)
    # Not by way of the L1 cache, since others write it.
    return gl.load(h_ptr + rows * R + ranks, mask=(rows < M) & (ranks < R) & here, other=0.0, cache_modifier=".cg")


@gluon.jit
def _consume(
    y, h_ptr, bias_ptr, space_ptr, xs, ws, thins, ys, ready, empty, scale, M, N, first_columns, steps,
    PART: gl.constexpr, R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, CHUNKS: gl.constexpr, BUFFERS: gl.constexpr, BIAS: gl.constexpr, W_T: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    thin: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, RANK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    rows = gl.cdiv(M, BM)
    columns = gl.cdiv(N, BN)
    firsts = rows * first_columns
    programs = gl.num_programs(0)
    # Counters: of the shares of each half's rows, and of the halves' rows of `h`. The shares lie behind them.
    written = space_ptr + 2 * rows
    shares = (space_ptr + 2 * rows + 4).to(gl.pointer_type(gl.float32), bitcast=True)
    # Tiles before this one begin before `h` is ready, and read it when they end.
    ready_from = gl.maximum(firsts, programs)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), rows * columns, programs):
        row, column = _place(tile, rows, columns, first_columns, GROUP)
        row0 = row * BM + PART * HALF
        if (tile >= ready_from) & (tile - programs < ready_from):
            _wait_for(written, 2 * rows)
        h = _read(h_ptr, row0, M, tile >= ready_from, R, thin, HALF)

        lo, hi = _share(tile, column, rows, first_columns, steps)
        acc = gl.zeros((HALF, BN), gl.float32, layout)
        share = gl.zeros((HALF, RANK), gl.float32, thin)
        if BIAS:
            acc = add_bias(acc, bias_ptr, column * BN, N, BN)
        acc, slot, phase = multiply(acc, xs, ws, ready, empty, slot, phase, lo, BK, PART, STAGES, W_T)
        acc, share, slot, phase = _multiply_both(
            acc, share, xs, ws, thins, ready, empty, slot, phase, hi - lo, BK, PART, STAGES, W_T
        )
        acc, slot, phase = multiply(acc, xs, ws, ready, empty, slot, phase, steps - hi, BK, PART, STAGES, W_T)

        if tile < firsts:
            at, ranks = _thin_at(row0, thin, HALF)
            if first_columns > 1:
                mine = shares + at * RANK + ranks
                gl.store(mine + column * (rows * BM * RANK), share)
                _count(space_ptr + 2 * row + PART)
                _wait_for(space_ptr + 2 * row + PART, first_columns)
                share = gl.zeros((HALF, RANK), gl.float32, thin)
                for i in range(0, first_columns, 4):
                    for j in gl.static_range(4):  # four on their way at once
                        each = mine + (i + j) * (rows * BM * RANK)
                        share += gl.load(each, mask=i + j < first_columns, other=0.0, cache_modifier=".cg")
            if R < RANK:  # what is not finite in x times the zeros that `a` is filled up with
                share = gl.where(ranks < R, share, 0.0)
            h = (scale * share).to(h.dtype)
            if column == 0:
                gl.store(h_ptr + at * R + ranks, h, mask=(at < M) & (ranks < R))
                _count(written)
        elif tile < ready_from:
            _wait_for(written, 2 * rows)
            h = _read(h_ptr, row0, M, True, R, thin, HALF)

        mbarrier.wait(ready.index(slot), phase)
        acc = warpgroup_mma(gl.convert_layout(h, operand), right_of(ws, slot, RANK, W_T), acc)
        mbarrier.arrive(empty.index(slot))
        slot, phase = next_slot(slot, phase, STAGES)
        store(acc, y, ys, row0, column * BN, PART, CHUNKS, BUFFERS)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["M", "N", "first_columns", "steps"])
def hopper_adapted_kernel(
    x_ptr,  # descriptor of x (M, K), blocks (BM // 2, BK)
    w_ptr,  # of w (K, N), blocks (BK, BN); if W_T of w.T, blocks (BN, BK)
    a_ptr,  # of a (K, R), blocks (BK, 16); if W_T of a.T, blocks (16, BK)
    b_ptr,  # of b (R, N) or b.T, blocks as of w
    y_ptr,  # of y (M, N), blocks (BM // 2, BN // CHUNKS)
    h_ptr,  # (M, R), contiguous, of x's dtype; written
    bias_ptr,  # (N,); not read unless BIAS
    space_ptr,  # int32 zeros: counters, of shares for each half of BM rows, of halves of h, and three more to fill up;
    # then, as float32, first_columns shares of (M to the next BM, 16), if more than one
    scale,
    M,
    N,
    first_columns,
    steps,  # blocks of K
    R: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,  # a half of a tile is stored in so many parts, by way of
    BUFFERS: gl.constexpr,  # so many buffers
    BIAS: gl.constexpr,
    W_T: gl.constexpr,
):
    xs = gl.allocate_shared_memory(x_ptr.dtype, [2 * STAGES, BM // 2, BK], x_ptr.layout)
    ws = gl.allocate_shared_memory(w_ptr.dtype, [STAGES] + w_ptr.block_shape, w_ptr.layout)
    thins = gl.allocate_shared_memory(a_ptr.dtype, [STAGES] + a_ptr.block_shape, a_ptr.layout)
    ys = gl.allocate_shared_memory(y_ptr.dtype, [2 * BUFFERS] + y_ptr.block_shape, y_ptr.layout)
    ready, empty = barriers(STAGES)
    rows = gl.cdiv(M, BM)
    columns = gl.cdiv(N, BN)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                y_ptr, h_ptr, bias_ptr, space_ptr, xs, ws, thins, ys, ready, empty, scale, M, N, first_columns,
                steps, 0, R, BM, BN, BK, GROUP, STAGES, CHUNKS, BUFFERS, BIAS, W_T,
            )),
            (_consume, (
                y_ptr, h_ptr, bias_ptr, space_ptr, xs, ws, thins, ys, ready, empty, scale, M, N, first_columns,
                steps, 1, R, BM, BN, BK, GROUP, STAGES, CHUNKS, BUFFERS, BIAS, W_T,
            )),
            (_produce, (
                x_ptr, w_ptr, a_ptr, b_ptr, xs, ws, thins, ready, empty, rows, columns, first_columns, steps,
                BM, BN, BK, GROUP, STAGES, W_T,
            )),
        ],
        [4, 1],
        [240, 24],  # registers of a thread: with the first consumer's 240, what three groups of four warps have
    )
    # fmt: on
