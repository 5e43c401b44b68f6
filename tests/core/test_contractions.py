"""Every way to write a product with a weight: sides, axes, batches, einsum, `@`, transposes, reshapes, slices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.core.harness import check, normal

# (weight shape, data shape, weight's side, dimension_numbers of (lhs, rhs), roles read from the trace)
MATRIX = [
    # 2-D, either axis, either side.
    ((6, 5), (4, 6), "rhs", (((1,), (0,)), ((), ())), "io"),
    ((5, 6), (4, 6), "rhs", (((1,), (1,)), ((), ())), "oi"),
    ((6, 5), (6, 4), "rhs", (((0,), (0,)), ((), ())), "io"),
    ((6, 5), (6, 4), "lhs", (((0,), (0,)), ((), ())), "io"),
    ((5, 6), (4, 6), "lhs", (((1,), (1,)), ((), ())), "oi"),
    ((5, 6), (2, 4, 6), "lhs", (((1,), (2,)), ((), ())), "oi"),
    ((6, 5), (2, 6, 4), "rhs", (((1,), (0,)), ((), ())), "io"),
    # 3-D, one or two contracted axes: heads as outputs, heads as inputs.
    ((6, 3, 4), (2, 6), "rhs", (((1,), (0,)), ((), ())), "ioo"),
    ((3, 6, 4), (2, 6), "rhs", (((1,), (1,)), ((), ())), "oio"),
    ((3, 4, 6), (2, 6), "rhs", (((1,), (2,)), ((), ())), "ooi"),
    ((3, 4, 6), (2, 3, 4), "rhs", (((1, 2), (0, 1)), ((), ())), "iio"),
    ((3, 4, 6), (2, 4, 3), "rhs", (((1, 2), (1, 0)), ((), ())), "iio"),
    ((6, 3, 4), (3, 4, 2), "lhs", (((1, 2), (0, 1)), ((), ())), "oii"),
    # 3-D with a batch axis: experts.
    ((3, 6, 5), (3, 4, 6), "rhs", (((2,), (1,)), ((0,), (0,))), "lio"),
    ((3, 6, 5), (3, 6, 4), "lhs", (((1,), (1,)), ((0,), (0,))), "lio"),
    ((6, 3, 5), (4, 3, 6), "rhs", (((2,), (0,)), ((1,), (1,))), "ilo"),
    # 4-D.
    ((2, 3, 4, 6), (5, 2, 3), "rhs", (((1, 2), (0, 1)), ((), ())), "iioo"),
    ((2, 3, 4, 6), (5, 6), "lhs", (((3,), (1,)), ((), ())), "oooi"),
    ((2, 3, 4, 6), (2, 3, 5, 4), "rhs", (((0, 3), (0, 2)), ((1,), (1,))), "ilio"),
    ((2, 3, 4, 6), (2, 3, 5, 4), "lhs", (((2,), (3,)), ((0, 1), (0, 1))), "llio"),
]


# The primitive itself, with its axes in numbers: what a version of jax makes of einsum and of `@` is below.
@pytest.mark.pinned
@pytest.mark.parametrize("w_shape, x_shape, side, numbers, roles", MATRIX)
def test_dot_general(w_shape, x_shape, side, numbers, roles):
    def fn(params, x):
        operands = (params["w"], x) if side == "lhs" else (x, params["w"])
        return lax.dot_general(*operands, numbers)

    plan = check(fn, {"w": normal(*w_shape)}, normal(*x_shape))
    assert plan.sites[0].roles == roles


EINSUMS = [
    ("...d,df->...f", (6, 5), (2, 3, 6), "io"),
    ("df,...d->...f", (6, 5), (2, 3, 6), "io"),
    ("bd,fd->bf", (5, 6), (3, 6), "oi"),
    ("dn,bd->bn", (6, 5), (4, 6), "io"),
    ("BTD,DNH->BTNH", (6, 3, 4), (2, 3, 6), "ioo"),
    ("BTD,NDH->BTNH", (3, 6, 4), (2, 3, 6), "oio"),
    ("BTD,SNDH->SBTNH", (2, 3, 6, 4), (2, 3, 6), "ooio"),
    ("BTNH,NHD->BTD", (3, 4, 6), (2, 3, 3, 4), "iio"),
    ("BTNH,HND->BTD", (4, 3, 6), (2, 3, 3, 4), "iio"),
    ("ebd,edf->ebf", (3, 6, 5), (3, 2, 6), "lio"),
    ("bed,edf->bef", (3, 6, 5), (2, 3, 6), "lio"),
    ("bed,efd->fbe", (3, 5, 6), (2, 3, 6), "loi"),
    ("bnd,ndh->bhn", (3, 6, 5), (2, 3, 6), "lio"),
]


@pytest.mark.parametrize("spec, w_shape, x_shape, roles", EINSUMS)
def test_einsum(spec, w_shape, x_shape, roles):
    weight_first = spec.split(",")[0] in ("df", "dn")

    def fn(params, x):
        return jnp.einsum(spec, *((params["w"], x) if weight_first else (x, params["w"])))

    assert check(fn, {"w": normal(*w_shape)}, normal(*x_shape)).sites[0].roles == roles


def widened(x):
    """(4, 3, 4) data from (4, 6) data."""
    return (x @ jnp.ones((6, 12))).reshape(4, 3, 4)


def thirds(w, x, cut):
    """A fused (6, 12) weight used as three of its own."""
    q, k, v = cut(w)
    return jnp.tanh(x @ q) * (x @ k) + x @ v


def uneven(w, x):
    left, right = jnp.split(w, [3], axis=1)
    return jnp.tanh(x @ left).sum(1) * (x @ right).sum(1)


def behind_a_barrier(w, x):
    w, y = lax.optimization_barrier((w, jnp.sin(x)))
    return y @ w


WRITTEN = {
    "matmul": (lambda w, x: x @ w, (6, 5), "io"),
    "matmul weight first": (lambda w, x: (w @ x.T).T, (5, 6), "oi"),
    "vector": (lambda w, x: x[0] @ w, (6, 5), "io"),
    "jnp.dot": (lambda w, x: jnp.dot(x, w), (6, 5), "io"),
    "jnp.matmul weight first, vector": (lambda w, x: jnp.matmul(w, x[0]), (5, 6), "oi"),
    "jnp.inner": (lambda w, x: jnp.inner(x, w), (5, 6), "oi"),
    "jnp.vdot per row": (lambda w, x: jax.vmap(lambda row: jnp.dot(row, x[0]))(w), (5, 6), "oi"),
    "tensordot": (lambda w, x: jnp.tensordot(x, w, axes=1), (6, 3, 4), "ioo"),
    "tensordot axes": (lambda w, x: jnp.tensordot(widened(x), w, axes=((1, 2), (2, 0))), (4, 5, 3), "ioi"),
    "T": (lambda w, x: x @ w.T, (5, 6), "oi"),
    "T of T": (lambda w, x: x @ w.T.T, (6, 5), "io"),
    "swapaxes": (lambda w, x: x @ jnp.swapaxes(w, 0, 1), (5, 6), "oi"),
    "transpose 3-D": (lambda w, x: jnp.einsum("bd,ndh->bnh", x, w.transpose(1, 2, 0)), (4, 3, 6), "ooi"),
    "moveaxis": (lambda w, x: jnp.tensordot(x, jnp.moveaxis(w, 1, 0), 1), (3, 6, 4), "oio"),
    "reshape merges outputs": (lambda w, x: x @ w.reshape(6, 12), (6, 3, 4), "ioo"),
    "reshape merges inputs": (lambda w, x: x @ w.reshape(6, 5), (2, 3, 5), "iio"),
    "reshape splits outputs": (lambda w, x: jnp.einsum("bd,dnh->bnh", x, w.reshape(6, 3, 4)), (6, 12), "io"),
    "reshape splits inputs": (
        lambda w, x: jnp.einsum("bnh,nhf->bf", x.reshape(4, 2, 3), w.reshape(2, 3, 5)), (6, 5), "io",
    ),
    "reshape and transpose": (
        lambda w, x: jnp.einsum("bd,ndh->bnh", x, w.reshape(6, 3, 4).transpose(1, 0, 2)), (6, 12), "io",
    ),
    "split with roles of its own": (
        lambda w, x: jnp.einsum("bnd,dnh->bnh", jnp.stack([x, 2 * x, 3 * x], 1), w.reshape(6, 3, 4)), (6, 12), "ilo",
    ),
    "reshape across a transpose": (lambda w, x: x @ w.transpose(1, 0, 2).reshape(6, 12), (3, 6, 4), "oio"),
    "expand_dims": (lambda w, x: jnp.einsum("bd,kdf->bkf", x, w[None]), (6, 5), "io"),
    "expand and squeeze": (lambda w, x: x @ w[:, None][..., None].squeeze((1, 3)), (6, 5), "io"),
    "newaxis, reshape": (lambda w, x: x @ w.reshape(1, 6, 1, 5).reshape(6, 5), (6, 5), "io"),
    "ravel": (lambda w, x: x @ w.ravel().reshape(6, 5), (6, 5), "io"),
    "leading one": (lambda w, x: x @ w[0], (1, 6, 5), "lio"),
    "index": (lambda w, x: jnp.tanh(x @ w[0]) @ w[1], (2, 6, 6), "lio"),
    "last index": (lambda w, x: jnp.tanh(x @ w[..., 0]) @ w[..., -1], (6, 6, 2), "iol"),
    "two indices": (lambda w, x: x @ w[0, 1] + jnp.sin(x @ w[1, 0]) + x @ w[1, 1] + x @ w[0, 0], (2, 2, 6, 5), "llio"),
    "jnp.take": (lambda w, x: jnp.tanh(x @ jnp.take(w, 2, axis=0)) @ jnp.take(w, 0, axis=0).T, (3, 6, 5), "lio"),
    "unstack": (lambda w, x: sum(jnp.sin(i + x @ row) for i, row in enumerate(w)), (3, 6, 5), "lio"),
    "columns": (lambda w, x: thirds(w, x, lambda w: (w[:, :4], w[:, 4:8], w[:, 8:])), (6, 12), "io"),
    "rows": (lambda w, x: jnp.tanh(x[:, :2] @ w[:2]) + x[:, 2:] @ w[2:], (6, 5), "io"),
    "every second column": (lambda w, x: jnp.tanh(x @ w[:, ::2]) * (x @ w[:, 1::2]), (6, 10), "io"),
    "jnp.split": (lambda w, x: thirds(w, x, lambda w: jnp.split(w, 3, axis=1)), (6, 12), "io"),
    "uneven split": (uneven, (6, 8), "io"),
    "slice of a reshape": (
        lambda w, x: thirds(w, x, lambda w: [w.reshape(6, 3, 4)[:, i] for i in range(3)]), (6, 12), "ilo",
    ),
    "thirds of merged axes": (
        lambda w, x: thirds(w, x, lambda w: jnp.split(w.reshape(6, 12), 3, axis=1)), (6, 3, 4), "ioo",
    ),
    "parts of a part of merged axes": (lambda w, x: x @ w.reshape(6, 12)[:, 5:8:2], (6, 3, 4), "ioo"),
    "rows of merged axes": (lambda w, x: x[:, :2] @ w.reshape(6, 5)[2:4], (3, 2, 5), "iio"),
    "flip of merged axes": (lambda w, x: x @ w.reshape(6, 12)[:, ::-1], (6, 3, 4), "ioo"),
    "flip": (lambda w, x: x @ w[::-1], (6, 5), "io"),
    "times a number": (lambda w, x: x @ (w * 0.5), (6, 5), "io"),
    "over a number": (lambda w, x: x @ (w / np.sqrt(6)), (6, 5), "io"),
    "times a traced number": (lambda w, x: x @ (w * x[0, 0]), (6, 5), "io"),
    "over a traced number": (lambda w, x: x @ (w / x.max()), (6, 5), "io"),
    "negative": (lambda w, x: x @ -w, (6, 5), "io"),
    "used twice": (lambda w, x: jnp.tanh(x @ w) @ w, (6, 6), "io"),
    "used from both sides": (lambda w, x: jnp.tanh(x @ w) @ w.T, (6, 5), "io"),
    "asarray, copy": (lambda w, x: x @ jnp.array(jnp.asarray(w)), (6, 5), "io"),
    "barrier": (behind_a_barrier, (6, 5), "io"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_written(name):
    use, shape, roles = WRITTEN[name]
    plan = check(lambda params, x: use(params["w"], x), {"w": normal(*shape)}, normal(4, 6))
    assert plan.sites[0].roles == roles
