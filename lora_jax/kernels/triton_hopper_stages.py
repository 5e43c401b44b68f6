"""What the products for Hopper share: the ring in shared memory, the products of its slots, how a tile is stored.

Letters, the same in every kernel file:
    M tokens    K input features    N output features    R rank

The ring has STAGES slots, each a block of `x` and one of `w`. Two consumers multiply, the upper and the lower half of a
tile: each block of `x` is two, PART 0 and 1, so that both are operands that begin at their first row.
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

# Their names since Triton 3.8, and before.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def grouped(tile, rows, columns, GROUP: gl.constexpr):
    """Row and column of a tile: down GROUP rows, then to the next column."""
    in_group = GROUP * columns
    first = tile // in_group * GROUP
    height = gl.minimum(rows - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The slot after this one, and the parity of its round through the ring."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def slot_before(slot, STAGES: gl.constexpr):
    """The slot before this one. Worked out, not remembered: a variable that takes over another's value in a loop and
    began with it is not seen to change.
    """
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def copy_right(w, ws, bar, slot, column0, k0, W_T: gl.constexpr):
    """A block of `w` into its part of a slot."""
    if W_T:
        _load(w, [column0, k0], bar, ws.index(slot))
    else:
        _load(w, [k0, column0], bar, ws.index(slot))


@gluon.jit
def copy_block(
    x, w, xs, ws, bar, slot, row0, column0, k0, HALF: gl.constexpr, W_T: gl.constexpr,
):  # fmt: skip
    """A block of `x` and one of `w` into a slot."""
    _load(x, [row0, k0], bar, xs.index(2 * slot))
    _load(x, [row0 + HALF, k0], bar, xs.index(2 * slot + 1))
    copy_right(w, ws, bar, slot, column0, k0, W_T)


@gluon.jit
def right_of(ws, slot, DEEP: gl.constexpr, W_T: gl.constexpr):
    """The first DEEP of a slot's block of `w`, as (DEEP, BN)."""
    if W_T:
        right = ws.index(slot).slice(0, DEEP, 1).permute((1, 0))
    else:
        right = ws.index(slot).slice(0, DEEP, 0)
    return right


@gluon.jit
def multiply(
    acc, xs, ws, ready, empty, slot, phase, steps,
    DEEP: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, W_T: gl.constexpr,
):  # fmt: skip
    """`acc` plus the products of the next `steps` slots, each given back as soon as the product after it is under way.

    DEEP: so much of each block's depth is multiplied, the rest being zeros.
    """
    for step in range(0, steps):
        mbarrier.wait(ready.index(slot), phase)
        left = xs.index(2 * slot + PART).slice(0, DEEP, 1)
        acc = warpgroup_mma(left, right_of(ws, slot, DEEP, W_T), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index(slot_before(slot, STAGES)), pred=step > 0)
        slot, phase = next_slot(slot, phase, STAGES)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index(slot_before(slot, STAGES)), pred=steps > 0)
    return acc, slot, phase


@gluon.jit
def add_bias(acc, bias_ptr, column0, N, BN: gl.constexpr):
    columns = column0 + gl.arange(0, BN, gl.SliceLayout(0, acc.type.layout))
    return acc + gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _halves(value):
    """The left and the right half of the columns."""
    rows: gl.constexpr = value.shape[0]
    columns: gl.constexpr = value.shape[1]
    return gl.split(gl.permute(gl.reshape(value, (rows, 2, columns // 2)), (0, 2, 1)))


@gluon.jit
def _chunks(value, CHUNKS: gl.constexpr):
    """`value` cut into CHUNKS tensors, a power of two of them, of neighbouring columns."""
    if CHUNKS == 1:
        return (value,)
    else:
        left, right = _halves(value)
        return _chunks(left, CHUNKS // 2) + _chunks(right, CHUNKS // 2)


@gluon.jit
def store(
    acc, y, ys, row0, column0, PART: gl.constexpr, CHUNKS: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """A half tile, in CHUNKS parts by way of BUFFERS in shared memory; the last copies are still under way."""
    parts = _chunks(acc, CHUNKS)
    for i in gl.static_range(CHUNKS):
        buffer = ys.index(PART * BUFFERS + i % BUFFERS)
        tma.store_wait(pendings=BUFFERS - 1)
        buffer.store(parts[i].to(y.dtype))
        fence_async_shared()
        _store(y, [row0, column0 + i * (acc.shape[1] // CHUNKS)], buffer)


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """One a slot for "is loaded", one for "is free": both consumers give a slot back."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    return ready, empty
