"""The wide half of the adapter alone, `t = mask / (1 - rate) * (h @ b) (+ bias)`: what a library's product is added to.

Letters, the same in every kernel file:
    M tokens    N output features    R rank

Bound by memory: `t` is written once and nothing of its size is read. One program writes one (BM, BN) tile.

Oracle: `lora_jax/reference.py`. Checked by: `tests/kernels/test_triton_up.py`.
"""

import triton
import triton.language as tl

from lora_jax.kernels.triton_dropout import kept


@triton.jit(do_not_specialize=["scale", "threshold"])
def up_kernel(
    h_ptr,  # (M, R)
    b_ptr,  # (R, N)
    bias_ptr,  # (N,); not read unless BIAS
    seed_ptr,  # see `triton_dropout.kept`; not read unless DROP
    t_ptr,  # (M, N)
    scale,
    threshold,
    M,
    N,
    stride_hm,
    stride_hr,
    stride_br,
    stride_bn,
    stride_tm,
    stride_tn,
    R: tl.constexpr,
    RP: tl.constexpr,  # R rounded up to a power of two, at least 16
    BM: tl.constexpr,
    BN: tl.constexpr,
    BIAS: tl.constexpr,
    DROP: tl.constexpr,
):
    # Neighbouring programs write neighbouring columns of the same rows, and so read the same rows of `h`.
    column_blocks = tl.cdiv(N, BN)
    row0 = tl.program_id(0) // column_blocks * BM
    column0 = tl.program_id(0) % column_blocks * BN
    rows = row0 + tl.arange(0, BM)
    columns = column0 + tl.arange(0, BN)
    ranks = tl.arange(0, RP)
    at = rows.to(tl.int64)[:, None] * stride_hm + ranks[None, :] * stride_hr
    h = tl.load(h_ptr + at, mask=(rows < M)[:, None] & (ranks < R)[None, :], other=0.0)
    at = ranks[:, None] * stride_br + columns.to(tl.int64)[None, :] * stride_bn
    b = tl.load(b_ptr + at, mask=(ranks < R)[:, None] & (columns < N)[None, :], other=0.0)
    t = tl.dot(h, b, input_precision="ieee")
    if DROP:
        t = tl.where(kept(seed_ptr, rows, column0, threshold, BM, BN), t * scale, 0.0)
    if BIAS:
        t += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_tm + columns[None, :] * stride_tn
    tl.store(t_ptr + at, t.to(t_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
