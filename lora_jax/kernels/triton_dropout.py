"""Dropout without a stored mask: each element's fate is a hash of two seed words and its global position.

Letters, the same in every kernel file:
    M tokens    K input features    N output features    R rank

All kernels and the XLA twin compute the same bits, so the mask that the forward pass used can be had again in the
backward pass, under rematerialisation and on a shard. One 32-bit word serves two columns 64 apart (`counter_bits`):

    word(i, p) = fmix(fmix(p ^ seed0) ^ (i * 0x9E3779B9 + seed1))        row i, pair p = j >> 7 << 6 | j & 63
    column j is kept if its half of the word, (word >> 16 * (j >> 6 & 1)) & 0xFFFF, is >= threshold

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
    keys = (row0 + rows.to(tl.uint32)) * 0x9E3779B9 + seed1
    words = fmix(fmix(pairs ^ seed0)[None, :] ^ keys[:, None])
    return ((words >> (((columns >> 6) & 1) * 16)[None, :]) & 0xFFFF) >= threshold
