"""Dropout without a stored mask: each element's fate is a hash of two seed words and its global position.

Letters, the same in every kernel file:
    M tokens    K input features    N output features    R rank

All kernels and the XLA twin compute the same bits, so the mask that the forward pass used can be had again in the
backward pass, under rematerialisation and on a shard. Modulo 2**32, for row i and column j (`counter_bits` says why):

    key = i * 0x9E3779B9 + seed1                              a = fmix(key) | 1
    v = (j >> 7 << 6 | j & 63) * 0x85EBCA6B + seed0           b = (v ^ v >> 16) * 0xC2B2AE35 | 1
    w = a * b + key                                           c = 0x27D4EB2F if j & 64 else 0xC2B2AE35

An element is kept if (w ^ w >> 16) * c, its first bit flipped, is >= threshold << 16.

The kernels only zero what is dropped. The factor 1 / (1 - rate) is applied to a float32 sum by whoever calls them.

**Source:** `fmix` is the finaliser of MurmurHash3 (Appleby), 0x9E3779B9 is 2**32 over the golden ratio.

Checked by: `tests/kernels/test_triton_dropout.py`.
"""

import triton
import triton.language as tl


@triton.jit
def fmix(v):
    """A bijection of uint32 in which each input bit changes each output bit about half of the time."""
    v ^= v >> 16
    v *= 0x85EBCA6B
    v ^= v >> 13
    v *= 0xC2B2AE35
    return v ^ (v >> 16)


@triton.jit
def kept(seed_ptr, rows, first_column, threshold, BM: tl.constexpr, BC: tl.constexpr):
    """Whether each element of a (BM, BC) tile is kept. `rows`: BM local row numbers; `first_column`: local.

    `seed_ptr`: four int32 words on the device: the two of the seed, then the global row and column of the
    matrix's first element.
    """
    seed0 = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    seed1 = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    row0 = tl.load(seed_ptr + 2).to(tl.uint32, bitcast=True)
    column0 = tl.load(seed_ptr + 3).to(tl.uint32, bitcast=True)
    columns = column0 + first_column + tl.arange(0, BC).to(tl.uint32)
    pairs = ((columns >> 7) << 6) | (columns & 63)
    v = pairs * 0x85EBCA6B + seed0
    b = ((v ^ (v >> 16)) * 0xC2B2AE35) | 1
    factor = tl.where((columns & 64) != 0, 0x27D4EB2F, 0xC2B2AE35).to(tl.uint32)
    key = (row0 + rows.to(tl.uint32)) * 0x9E3779B9 + seed1
    w = (fmix(key) | 1)[:, None] * b[None, :] + key[:, None]
    # Signed numbers take the flip of the first bit for free; "above the last dropped one" is in range also for a rate
    # of 1.
    drawn = ((w ^ (w >> 16)) * factor[None, :]).to(tl.int32, bitcast=True)
    last = ((tl.cast(threshold, tl.uint32) << 16) + 0x7FFFFFFF).to(tl.int32, bitcast=True)
    return drawn > last
