"""Adds the partial sums of a split reduction in a fixed order: deterministic, where atomics would not be.

Checked by: `tests/kernels/test_triton_down.py` and `test_triton_outer.py`.
"""

import triton
import triton.language as tl


@triton.jit
def sum_kernel(
    parts_ptr,  # (PARTS, size), contiguous, float32
    out_ptr,  # (size,), contiguous
    size,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(PARTS):
        acc += tl.load(parts_ptr + at, mask=at < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=at < size)
