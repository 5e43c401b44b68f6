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

Needs Triton 3.6 or later. Oracle: `lora_jax/reference.py`. Checked by: `tests/interop/test_product_gpu.py`; compiled by
`tests/kernels/test_triton_compiled.py`. Gluon has no interpreter.
"""

# Gluon's builtins say what they are to its compiler alone: the types that Python sees in them are not those.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from lora_jax.kernels.triton_hopper_stages import (
    add_bias,
    barriers,
    copy_block,
    grouped,
    multiply,
    next_slot,
    store,
)


@gluon.jit
def _place(tile, M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """The first row and the first column of a tile."""
    row, column = grouped(tile, gl.cdiv(M, BM), gl.cdiv(N, BN), GROUP)
    return row * BM, column * BN


@gluon.jit
def _copy(
    left, right, xs, ws, ready, empty, slot, phase, row0, column0, steps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, W_T: gl.constexpr,
):  # fmt: skip
    """`steps` blocks of both operands, each into the next slot that is free."""
    BYTES: gl.constexpr = (BM + BN) * BK * xs.dtype.primitive_bitwidth // 8
    for step in range(0, steps):
        mbarrier.wait(empty.index(slot), phase)
        bar = ready.index(slot)
        mbarrier.expect(bar, BYTES)
        copy_block(left, right, xs, ws, bar, slot, row0, column0, step * BK, BM // 2, W_T)
        slot, phase = next_slot(slot, phase, STAGES)
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
        acc = gl.zeros((HALF, BN), gl.float32, layout)
        acc, slot, phase = multiply(acc, xs, ws, ready, empty, slot, phase, tail_steps, TAIL, PART, STAGES, W_T)
        if BIAS:
            acc = add_bias(acc, bias_ptr, column0, N, BN)
        acc, slot, phase = multiply(acc, xs, ws, ready, empty, slot, phase, steps, BK, PART, STAGES, W_T)
        store(acc, y, ys, row0 + PART * HALF, column0, PART, CHUNKS, BUFFERS)
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
    ready, empty = barriers(STAGES)
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
