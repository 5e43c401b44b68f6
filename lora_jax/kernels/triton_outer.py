"""The gradients of the factors, sums over all tokens: `out = scale * t.T @ drop(v)`, (R, C), in float32.

Letters, the same in every kernel file:
    M tokens    K input features    N output features    R rank

`dA.T` is `outer(g, x)` with C = K, `dB` is `outer(h, dy)` with C = N. Bound by memory: `v` is read once. One program
owns BC columns and one of SPLIT ranges of the tokens; with SPLIT > 1 it writes a partial sum, and `triton_sum.py`
adds the partial sums in a fixed order.

Bytes: M * C of `v`, once, and M * R of `t` per column block, from the L2 cache.

Oracle: `lora_jax/reference.py`. Checked by: `tests/kernels/test_triton_outer.py`.
"""

import triton
import triton.language as tl

from lora_jax.kernels.triton_dropout import kept


@triton.jit(do_not_specialize=["scale", "threshold"])
def outer_kernel(
    t_ptr,  # (M, R)
    v_ptr,  # (M, C), or its descriptor with (BM, BC) blocks if TMA
    seed_ptr,  # see `triton_dropout.kept`; not read unless DROP
    out_ptr,  # (R, C), or (SPLIT, R, C) partial sums, float32
    scale,
    threshold,
    M,
    C,
    stride_tm,
    stride_tr,
    stride_vm,
    stride_vc,
    stride_os,
    stride_or,
    stride_oc,
    R: tl.constexpr,
    RP: tl.constexpr,  # R rounded up to a power of two, at least 16
    BM: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    DROP: tl.constexpr,
    TMA: tl.constexpr,
):
    # Neighbouring programs read neighbouring columns of the same rows: whole rows of `v` stream past.
    column_blocks = tl.cdiv(C, BC)
    part = tl.program_id(0) // column_blocks
    column0 = (tl.program_id(0) % column_blocks) * BC
    steps = tl.cdiv(tl.cdiv(M, BM), SPLIT)
    first = part * steps * BM
    last = tl.minimum(first + steps * BM, M)
    columns = column0 + tl.arange(0, BC)
    ranks = tl.arange(0, RP)
    here = (columns < C)[None, :]

    # With the rank as the row of the product, `v` is the operand that the matrix unit takes as it lies in memory.
    acc = tl.zeros((RP, BC), tl.float32)
    for m0 in range(first, last, BM):
        rows = m0 + tl.arange(0, BM)
        if TMA:
            v = v_ptr.load([m0, column0])
        else:
            at = rows.to(tl.int64)[:, None] * stride_vm + columns[None, :] * stride_vc
            v = tl.load(v_ptr + at, mask=(rows < M)[:, None] & here, other=0.0)
        at = rows.to(tl.int64)[None, :] * stride_tm + ranks[:, None] * stride_tr
        t = tl.load(t_ptr + at, mask=(rows < M)[None, :] & (ranks < R)[:, None], other=0.0)
        if DROP:
            v = tl.where(kept(seed_ptr, rows, column0, threshold, BM, BC), v, 0.0)
        acc = tl.dot(t, v, acc, input_precision="ieee")

    at = part.to(tl.int64) * stride_os + ranks[:, None] * stride_or + columns[None, :] * stride_oc
    tl.store(out_ptr + at, scale * acc, mask=(ranks < R)[:, None] & here)
