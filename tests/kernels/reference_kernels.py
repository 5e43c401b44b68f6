"""A family of kernels in plain jnp: the interface of `lora_jax/ops/families.py`, written down a second time.

Sums in float32, rounded once. Masks by the formula in `counter_bits`' docstring, in unsigned arithmetic. `h` comes back
padded in both directions, as the real kernels' does: rank-major for small ranks, row-major for large ones, and with
rows beyond M that hold NaN wherever nobody may read them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import _compat
from lora_jax.kernels.linear import Drop as Drop
from lora_jax.kernels.linear import Wants as Wants
from lora_jax.ops import choice
from lora_jax.ops.families import FAMILIES, Family

calls: list[tuple[str, tuple[int, ...]]] = []


def unsupported(m: int, k: int, n: int, rank: int, dtype: Any) -> str | None:
    return f"rank {rank} is more than 64" if rank > 64 else None


def slower(m: int, k: int, n: int, rank: int, dtype: Any, dropped: bool, device_kind: str) -> str | None:
    return f"M={m} is below 3 on {device_kind}" if m < 3 else None


def h_layout(rank: int) -> tuple[bool, int]:
    return rank <= 16, -(-rank // 16) * 16


def product(x: Any, y: Any) -> jax.Array:
    return jnp.dot(x.astype(jnp.float32), y.astype(jnp.float32), precision="highest")


def mask(shape: tuple[int, int], drop: Drop) -> jax.Array:
    """0 or 65536 / (65536 - threshold)."""

    def mixed(v):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            v = (v ^ (v >> shift)) * jnp.uint32(factor)
        return v ^ (v >> 16)

    seed = jax.lax.bitcast_convert_type(drop.seed, jnp.uint32)
    row = jnp.arange(shape[0], dtype=jnp.uint32)[:, None] + seed[2]
    column = jnp.arange(shape[1], dtype=jnp.uint32)[None] + seed[3]
    key = row * jnp.uint32(0x9E3779B9) + seed[1]
    v = (column // 128 * 64 + column % 64) * jnp.uint32(0x85EBCA6B) + seed[0]
    word = (mixed(key) | 1) * ((v ^ v >> 16) * jnp.uint32(0xC2B2AE35) | 1) + key
    factor = jnp.where(column // 64 % 2 == 1, jnp.uint32(0x27D4EB2F), jnp.uint32(0xC2B2AE35))
    bits = (word ^ word >> 16) * factor >> 16 ^ 0x8000
    return (bits >= drop.threshold) * jnp.float32(65536 / (65536 - drop.threshold))


def forward(x, w, a, b, drop=None, *, transposed=False, bias=None):
    calls.append(("forward", (*x.shape, *b.shape[::-1])))
    assert x.shape[1] == a.shape[0] and w.shape == (
        (b.shape[1], x.shape[1]) if transposed else (x.shape[1], b.shape[1])
    )
    assert {x.dtype, w.dtype, a.dtype, b.dtype} == {x.dtype}
    keep = 1 if drop is None else mask(x.shape, drop)
    h = product(x * keep, a).astype(x.dtype)
    y = product(x, w.T if transposed else w) + product(h, b)
    if bias is not None:
        assert bias.shape == b.shape[1:] and bias.dtype in (x.dtype, jnp.float32)
        y += bias.astype(jnp.float32)
    y = y.astype(x.dtype)
    rank_first, thin = h_layout(a.shape[1])
    rows = -(-len(x) // 64) * 64
    h = jnp.pad(h, ((0, 0), (0, thin - h.shape[1])))
    h = jnp.pad(h, ((0, rows - len(h)), (0, 0)), constant_values=np.nan)
    return y, h.T if rank_first else h


def backward(dy, x, w, a, b, h, drop=None, *, transposed=False, wants=Wants()):  # noqa: B008
    calls.append(("backward", (*x.shape, *b.shape[::-1])))
    (m, r), keep = (len(x), a.shape[1]), 1 if drop is None else mask(x.shape, drop)
    h = (h.T if h_layout(r)[0] else h)[:m, :r]
    g = product(dy, b.T).astype(x.dtype)
    dx = (product(dy, w if transposed else w.T) + keep * product(g, a.T)).astype(x.dtype)
    da, db = product((x * keep).T, g), product(h.T, dy)
    return dx if wants.x else None, da if wants.a else None, db if wants.b else None


@contextlib.contextmanager
def installed(name: str = "reference", platform: str = "cpu"):
    """Puts this family before all others, for one platform; yields the list of its calls."""
    before = dict(FAMILIES)
    FAMILIES.clear()
    others = {"group": "tests.kernels.reference_group", "many": "tests.kernels.reference_many"}
    FAMILIES.update({name: Family(__name__, (platform,), f"a {platform}", **others), **before})
    calls.clear()
    jax.clear_caches()  # what was traced before would not be traced, and counted, again
    try:
        yield calls
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


@contextlib.contextmanager
def pretending(kind: str, capability: tuple[int, int] = (9, 0), multiprocessors: int | None = None):
    """Traces as if the default device were an NVIDIA GPU; nothing can be run."""
    real = _compat.target_device
    choice._compat.target_device = lambda: _compat.Device("cuda", kind, capability, multiprocessors)
    try:
        yield
    finally:
        choice._compat.target_device = real
