"""A product with a frozen weight and the adapter's low-rank tail in one kernel, `y = x @ w + h @ b (+ bias)`.

Letters, the same in every kernel file:
    M tokens    K input features    N output features    R rank

The input's gradient, `dx = dy @ w.T + mask / (1 - rate) * (g @ a.T)`, is the same product of other operands (K and N
change places), with the mask on the tail; so both directions are this kernel.

One program owns one (BM, BN) tile of `y` at a time, and takes every P-th tile of P programs. It walks K, adds the
tail to the float32 accumulator, and stores once: the adapter costs R / K more multiplications and no pass over `y`.
What a tile's tail needs is asked for when the previous tile is done and waits in registers during the walk, because
a load after the walk would leave the matrix unit idle.

Tiles are handed out in groups of GROUP row blocks, so that programs running together share rows of `x` and columns
of `w` in the L2 cache.

Oracle: `lora_jax/reference.py`. Checked by: `tests/kernels/test_triton_gemm.py`.
"""

import triton
import triton.language as tl

from lora_jax.kernels.triton_dropout import kept


@triton.jit
def _halves(value):
    """The left and the right half of the columns."""
    rows: tl.constexpr = value.shape[0]
    columns: tl.constexpr = value.shape[1]
    return tl.split(tl.permute(tl.reshape(value, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def _chunks(value, CHUNKS: tl.constexpr):
    """`value` cut into 1, 2 or 4 tensors of neighbouring columns."""
    if CHUNKS == 1:
        return (value,)
    elif CHUNKS == 2:
        return _halves(value)
    else:
        halves = _halves(value)
        return _halves(halves[0]) + _halves(halves[1])


@triton.jit
def _place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The first row and the first column of a tile: down GROUP row blocks, then to the next column block."""
    row_blocks = tl.cdiv(M, BM)
    in_group = GROUP * tl.cdiv(N, BN)
    first = tile // in_group * GROUP
    # At least one: the place after the last tile is asked for too, and then not used.
    height = tl.maximum(tl.minimum(row_blocks - first, GROUP), 1)
    return (first + tile % in_group % height) * BM, tile % in_group // height * BN


@triton.jit
def _bits(value):
    """`value` as integers. Turning it back where it is used pins its way to shared memory to that place."""
    if value.dtype.primitive_bitwidth == 16:
        return value.to(tl.int16, bitcast=True)
    else:
        return value.to(tl.int32, bitcast=True)


@triton.jit
def _load_h(h_ptr, row0, rank0, M, stride_hm, stride_hr, R: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr):
    """BM rows and RC ranks of `h`, as bits."""
    rows = row0 + tl.arange(0, BM)
    ranks = rank0 + tl.arange(0, RC)
    at = rows.to(tl.int64)[:, None] * stride_hm + ranks[None, :] * stride_hr
    return _bits(tl.load(h_ptr + at, mask=(rows < M)[:, None] & (ranks < R)[None, :], other=0.0))


@triton.jit
def _load_b(b_ptr, rank0, column0, N, stride_br, stride_bn, R: tl.constexpr, RC: tl.constexpr, BC: tl.constexpr):
    """RC ranks and BC columns of `b`, as bits."""
    ranks = rank0 + tl.arange(0, RC)
    columns = column0 + tl.arange(0, BC)
    at = ranks[:, None] * stride_br + columns.to(tl.int64)[None, :] * stride_bn
    return _bits(tl.load(b_ptr + at, mask=(ranks < R)[:, None] & (columns < N)[None, :], other=0.0))


@triton.jit
def _load_tail(
    h_ptr,
    b_ptr,
    row0,
    column0,
    M,
    N,
    stride_hm,
    stride_hr,
    stride_br,
    stride_bn,
    R: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A tile's BM rows of `h`, and its columns of `b` in CHUNKS tensors, as `_chunks` cuts the accumulator."""
    h = _load_h(h_ptr, row0, 0, M, stride_hm, stride_hr, R, RP, BM)
    b = ()
    for i in tl.static_range(CHUNKS):
        b += (_load_b(b_ptr, 0, column0 + i * BC, N, stride_br, stride_bn, R, RP, BC),)
    return h, b


@triton.jit(do_not_specialize=["tail_scale", "threshold"])
def gemm_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (K, N)
    h_ptr,  # (M, R)
    b_ptr,  # (R, N)
    bias_ptr,  # (N,); not read unless BIAS
    seed_ptr,  # see `triton_dropout.kept`; not read unless DROP
    y_ptr,  # (M, N)
    tail_scale,  # of the kept elements of the tail; not used unless DROP
    threshold,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_hm,
    stride_hr,
    stride_br,
    stride_bn,
    stride_ym,
    stride_yn,
    R: tl.constexpr,
    RP: tl.constexpr,  # R rounded up to a power of two, at least 16
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,  # the tail and the store go column chunk by column chunk, to save shared memory
    PREFETCH: tl.constexpr,  # the tail before the walk, if the registers hold it; or after it, in parts
    BIAS: tl.constexpr,
    DROP: tl.constexpr,
):
    BC: tl.constexpr = BN // CHUNKS
    element: tl.constexpr = h_ptr.dtype.element_ty
    RC: tl.constexpr = 1024 // h_ptr.dtype.element_ty.primitive_bitwidth  # ranks of a tail after the walk, at a time
    programs = tl.num_programs(0)
    steps = tl.cdiv(K, BK)
    mine = tl.cdiv(tl.cdiv(M, BM) * tl.cdiv(N, BN) - tl.program_id(0), programs)

    row0, column0 = _place(tl.program_id(0), M, N, BM, BN, GROUP)
    if PREFETCH:
        h, b = _load_tail(
            h_ptr, b_ptr, row0, column0, M, N, stride_hm, stride_hr, stride_br, stride_bn, R, RP, BM, BC, CHUNKS
        )
    acc = tl.zeros((BM, BN), tl.float32)
    tile = tl.program_id(0) - programs
    step = -1
    # One loop over the steps of all tiles, not a loop per tile: so the next tile's first operands of the walk are on
    # their way while this tile is stored.
    for _ in range(0, mine * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += programs
            row0, column0 = _place(tile, M, N, BM, BN, GROUP)
        k0 = step * BK
        ks = k0 + tl.arange(0, BK)
        rows = row0 + tl.arange(0, BM)
        columns = column0 + tl.arange(0, BN)
        x_at = rows.to(tl.int64)[:, None] * stride_xm + ks[None, :] * stride_xk
        x = tl.load(x_ptr + x_at, mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0)
        w_at = ks.to(tl.int64)[:, None] * stride_wk + columns.to(tl.int64)[None, :] * stride_wn
        w = tl.load(w_ptr + w_at, mask=(ks < K)[:, None] & (columns < N)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")

        if step == steps - 1:
            rows = row0 + tl.arange(0, BM)
            if BIAS:
                columns = column0 + tl.arange(0, BN)
                acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            accs = _chunks(acc, CHUNKS)
            for i in tl.static_range(CHUNKS):
                chunk0 = column0 + i * BC
                if DROP:
                    y = tl.zeros((BM, BC), tl.float32)
                else:
                    y = accs[i]
                if PREFETCH:
                    y = tl.dot(h.to(element, bitcast=True), b[i].to(element, bitcast=True), y, input_precision="ieee")
                else:
                    # Unrolled, because a loop in here would keep the walk from being pipelined.
                    for rank0 in tl.static_range(0, RP, RC):  # pyright: ignore[reportGeneralTypeIssues]
                        h_part = _load_h(h_ptr, row0, rank0, M, stride_hm, stride_hr, R, RC, BM)
                        b_part = _load_b(b_ptr, rank0, chunk0, N, stride_br, stride_bn, R, RC, BC)
                        h_part = h_part.to(element, bitcast=True)
                        y = tl.dot(h_part, b_part.to(element, bitcast=True), y, input_precision="ieee")
                if DROP:
                    keep = kept(seed_ptr, rows, chunk0, threshold, BM, BC)
                    y = accs[i] + tl.where(keep, y * tail_scale, 0.0)
                chunk = chunk0 + tl.arange(0, BC)
                y_at = rows.to(tl.int64)[:, None] * stride_ym + chunk[None, :] * stride_yn
                tl.store(y_ptr + y_at, y.to(element), mask=(rows < M)[:, None] & (chunk < N)[None, :])
            acc = tl.zeros((BM, BN), tl.float32)
            if PREFETCH:
                # Of the next tile: these loads have its whole walk over K to arrive.
                next_row0, next_column0 = _place(tile + programs, M, N, BM, BN, GROUP)
                h, b = _load_tail(
                    h_ptr,
                    b_ptr,
                    next_row0,
                    next_column0,
                    M,
                    N,
                    stride_hm,
                    stride_hr,
                    stride_br,
                    stride_bn,
                    R,
                    RP,
                    BM,
                    BC,
                    CHUNKS,
                )
