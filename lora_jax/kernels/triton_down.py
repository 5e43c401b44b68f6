"""The narrow product before the adapter's wide one, `h = scale * drop(x) @ a`; also `g = scale * dy @ b.T`.

Letters, the same in every kernel file:
    M tokens    K input features    N output features    R rank

Bound by memory: `x` is read once, from end to end, and nothing else of its size is touched. One program owns BM rows
and one of SPLIT ranges of K. With SPLIT > 1 it writes a float32 partial sum, and `triton_sum.py` adds the partial
sums in a fixed order, so the result does not depend on which program comes first.

Bytes: M * K of `x`, once, and K * R of `a` per row block, from the L2 cache.

Oracle: `lora_jax/reference.py`. Checked by: `tests/kernels/test_triton_down.py`.
"""

import triton
import triton.language as tl

from lora_jax.kernels.triton_dropout import kept


@triton.jit(do_not_specialize=["scale", "threshold"])
def down_kernel(
    x_ptr,  # (M, K), or its descriptor with (BM, BK) blocks if TMA
    a_ptr,  # (K, R)
    seed_ptr,  # see `triton_dropout.kept`; not read unless DROP
    h_ptr,  # (M, R), or (SPLIT, M, R) partial sums in float32
    scale,
    threshold,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_ak,
    stride_ar,
    stride_hs,
    stride_hm,
    stride_hr,
    R: tl.constexpr,
    RP: tl.constexpr,  # R rounded up to a power of two, at least 16
    BM: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    DROP: tl.constexpr,
    TMA: tl.constexpr,
):
    # Neighbouring programs share a range of K: they read the same part of `a`.
    row_blocks = tl.cdiv(M, BM)
    part = tl.program_id(0) // row_blocks
    row0 = (tl.program_id(0) % row_blocks) * BM
    steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    first = part * steps * BK
    last = tl.minimum(first + steps * BK, K)
    rows = row0 + tl.arange(0, BM)
    ranks = tl.arange(0, RP)
    here = (rows < M)[:, None]

    acc = tl.zeros((BM, RP), tl.float32)
    for k0 in range(first, last, BK):
        ks = k0 + tl.arange(0, BK)
        if TMA:
            x = x_ptr.load([row0, k0])
        else:
            at = rows.to(tl.int64)[:, None] * stride_xm + ks[None, :] * stride_xk
            x = tl.load(x_ptr + at, mask=here & (ks < K)[None, :], other=0.0)
        at = ks[:, None] * stride_ak + ranks[None, :] * stride_ar
        a = tl.load(a_ptr + at, mask=(ks < K)[:, None] & (ranks < R)[None, :], other=0.0)
        if DROP:
            x = tl.where(kept(seed_ptr, rows, k0, threshold, BM, BK), x, 0.0)
        acc = tl.dot(x, a, acc, input_precision="ieee")

    at = part.to(tl.int64) * stride_hs + rows.to(tl.int64)[:, None] * stride_hm + ranks[None, :] * stride_hr
    tl.store(h_ptr + at, (scale * acc).to(h_ptr.dtype.element_ty), mask=here & (ranks < R)[None, :])
