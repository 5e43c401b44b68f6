"""`y = x @ w + h @ b (+ bias)` on Hopper: what `triton_gemm` computes, by specialised warps, in Gluon.

Letters, the same in every kernel file:
    M tokens    K input features    N output features    R rank

One program stays on each multiprocessor and takes every P-th tile of P programs. Nine warps work on a tile:

    one producer        copies blocks of x and w, and before them of h and b, into a ring of STAGES in shared memory
    two consumers       four warps each, on the upper and the lower half of the tile: multiply what is ready, keep the
                        sum in registers, store it by way of shared memory

The producer runs ahead over the ends of tiles, so the next tile's first operands arrive while this one is stored. The
tail comes first, with the bias, while the ring fills up; its R is filled up to a block with zeros by the copies
themselves, as all edges are.

There is no dropout in it: the eight warps of the consumers take longer to find the mask of a tile than
`triton_up`, with all the threads that fit, to write it out.

Needs Triton 3.6 or later. Oracle: `lora_jax/reference.py`. Checked by: `tests/interop/test_lora_gpu.py`, and compiled
by `tests/kernels/test_triton_compiled.py`; Gluon has no interpreter.
"""

# Gluon's builtins say what they are to its compiler alone: the types that Python sees in them are not those.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _place(tile, M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """The first row and the first column of a tile: down GROUP row blocks, then to the next column block."""
    row_blocks = gl.cdiv(M, BM)
    in_group = GROUP * gl.cdiv(N, BN)
    first = tile // in_group * GROUP
    height = gl.minimum(row_blocks - first, GROUP)
    return (first + tile % in_group % height) * BM, tile % in_group // height * BN


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """The slot after this one, and the parity of its round through the ring."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _before(slot, STAGES: gl.constexpr):
    """The slot before this one. Worked out, not remembered: a variable that takes over another's value in a loop and
    began with it is not seen to change.
    """
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def _copy(
    left, right, xs, ws, ready, empty, slot, phase, row0, column0, steps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, W_T: gl.constexpr,
):  # fmt: skip
    """`steps` blocks of both operands, each into the next slot that is free."""
    BYTES: gl.constexpr = (BM + BN) * BK * xs.dtype.primitive_bitwidth // 8
    for step in range(0, steps):
        k0 = step * BK
        mbarrier.wait(empty.index(slot), phase)
        bar = ready.index(slot)
        mbarrier.expect(bar, BYTES)
        tma.async_copy_global_to_shared(left, [row0, k0], bar, xs.index(2 * slot))
        tma.async_copy_global_to_shared(left, [row0 + BM // 2, k0], bar, xs.index(2 * slot + 1))
        if W_T:
            tma.async_copy_global_to_shared(right, [column0, k0], bar, ws.index(slot))
        else:
            tma.async_copy_global_to_shared(right, [k0, column0], bar, ws.index(slot))
        slot, phase = _next(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _produce(
    x, w, h, b, xs, ws, ready, empty, M, N, steps, tail_steps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    W_T: gl.constexpr,
):  # fmt: skip
    slot = 0
    phase = 1  # a barrier that nothing has passed through lets this parity pass: the ring is empty
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        row0, column0 = _place(tile, M, N, BM, BN, GROUP)
        slot, phase = _copy(
            h, b, xs, ws, ready, empty, slot, phase, row0, column0, tail_steps, BM, BN, BK, STAGES, W_T
        )  # fmt: skip
        slot, phase = _copy(x, w, xs, ws, ready, empty, slot, phase, row0, column0, steps, BM, BN, BK, STAGES, W_T)


@gluon.jit
def _multiply(
    acc, xs, ws, ready, empty, slot, phase, steps,
    DEEP: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, W_T: gl.constexpr,
):  # fmt: skip
    """`acc` plus the products of the next `steps` slots, each given back as soon as the product after it is under way.

    DEEP: so much of each block's depth is multiplied, the rest being zeros.
    """
    for step in range(0, steps):
        mbarrier.wait(ready.index(slot), phase)
        left = xs.index(2 * slot + PART).slice(0, DEEP, 1)
        if W_T:
            right = ws.index(slot).slice(0, DEEP, 1).permute((1, 0))
        else:
            right = ws.index(slot).slice(0, DEEP, 0)
        acc = warpgroup_mma(left, right, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index(_before(slot, STAGES)), pred=step > 0)
        slot, phase = _next(slot, phase, STAGES)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index(_before(slot, STAGES)))
    return acc, slot, phase


@gluon.jit
def _halves(value):
    """The left and the right half of the columns."""
    rows: gl.constexpr = value.shape[0]
    columns: gl.constexpr = value.shape[1]
    return gl.split(gl.permute(gl.reshape(value, (rows, 2, columns // 2)), (0, 2, 1)))


@gluon.jit
def _chunks(value, CHUNKS: gl.constexpr):
    """`value` cut into 1, 2 or 4 tensors of neighbouring columns."""
    if CHUNKS == 1:
        return (value,)
    elif CHUNKS == 2:
        return _halves(value)
    else:
        left, right = _halves(value)
        return _halves(left) + _halves(right)


@gluon.jit
def _consume(
    y, bias_ptr, xs, ws, ys, ready, empty, M, N, steps, tail_steps,
    PART: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, TAIL: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, CHUNKS: gl.constexpr, BUFFERS: gl.constexpr, BIAS: gl.constexpr,
    W_T: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        row0, column0 = _place(tile, M, N, BM, BN, GROUP)
        row0 += PART * HALF
        acc = gl.zeros((HALF, BN), gl.float32, layout)
        acc, slot, phase = _multiply(acc, xs, ws, ready, empty, slot, phase, tail_steps, TAIL, PART, STAGES, W_T)
        if BIAS:
            columns = column0 + gl.arange(0, BN, gl.SliceLayout(0, layout))
            acc += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
        acc, slot, phase = _multiply(acc, xs, ws, ready, empty, slot, phase, steps, BK, PART, STAGES, W_T)

        parts = _chunks(acc, CHUNKS)
        for i in gl.static_range(CHUNKS):
            buffer = ys.index(PART * BUFFERS + i % BUFFERS)
            tma.store_wait(pendings=BUFFERS - 1)
            buffer.store(parts[i].to(y.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(y, [row0, column0 + i * (BN // CHUNKS)], buffer)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["M", "N", "steps", "tail_steps"])
def hopper_gemm_kernel(
    x_ptr,  # descriptor of x (M, K), blocks (BM // 2, BK)
    w_ptr,  # of w (K, N), blocks (BK, BN); if W_T of w.T, blocks (BN, BK)
    h_ptr,  # of h (M, R), blocks as of x
    b_ptr,  # of b (R, N) or b.T, blocks as of w
    y_ptr,  # of y (M, N), blocks (BM // 2, BN // CHUNKS)
    bias_ptr,  # (N,); not read unless BIAS
    M,
    N,
    steps,  # blocks of K
    tail_steps,  # blocks of R
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    TAIL: gl.constexpr,  # R rounded up to 16, 32 or BK: what is multiplied of a block of the tail
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,  # a half of a tile is stored in so many parts, by way of
    BUFFERS: gl.constexpr,  # so many buffers
    BIAS: gl.constexpr,
    W_T: gl.constexpr,
):
    xs = gl.allocate_shared_memory(x_ptr.dtype, [2 * STAGES, BM // 2, BK], x_ptr.layout)
    ws = gl.allocate_shared_memory(w_ptr.dtype, [STAGES] + w_ptr.block_shape, w_ptr.layout)
    ys = gl.allocate_shared_memory(y_ptr.dtype, [2 * BUFFERS] + y_ptr.block_shape, y_ptr.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # both consumers give a slot back
    fence_async_shared()
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                y_ptr, bias_ptr, xs, ws, ys, ready, empty, M, N, steps, tail_steps,
                0, BM, BN, BK, TAIL, GROUP, STAGES, CHUNKS, BUFFERS, BIAS, W_T,
            )),
            (_consume, (
                y_ptr, bias_ptr, xs, ws, ys, ready, empty, M, N, steps, tail_steps,
                1, BM, BN, BK, TAIL, GROUP, STAGES, CHUNKS, BUFFERS, BIAS, W_T,
            )),
            (_produce, (
                x_ptr, w_ptr, h_ptr, b_ptr, xs, ws, ready, empty, M, N, steps, tail_steps,
                BM, BN, BK, GROUP, STAGES, W_T,
            )),
        ],
        [4, 1],
        [240, 24],  # registers of a thread: with the first consumer's 240, what three groups of four warps have
    )
    # fmt: on
