"""The Hopper kernels on a Hopper GPU, at sizes that keep all of it busy: `pytest -m gpu tests/kernels`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels import mosaic_group, mosaic_lora
from tests.kernels.problems import BF16, F16, GroupProblem, Problem, seed_words

THRESHOLD = 13107
# Odd and aligned sizes, every class of ranks; few rows, where K is split.
SIZES = [
    (1001, 1000, 1111, 5),
    (2048, 1024, 2048, 16),
    (256, 4096, 1024, 1),
    (1023, 2112, 1088, 20),
    (1000, 576, 1536, 64),
    (777, 1024, 999, 128),
    (1024, 640, 1280, 192),
    (512, 2048, 1024, 256),
]


def problems():
    """Each size with dropout for both orientations of the weight and without for one; both dtypes in turn."""
    for i, size in enumerate(SIZES):
        dtype = (BF16, F16)[i // 2 % 2]
        yield Problem(*size, dtype=dtype, transposed=i % 2 == 1)
        yield Problem(*size, dtype=dtype, transposed=i % 2 == 0, bias_dtype=(dtype, np.float32)[i // 4 % 2])
        for transposed in (False, True):
            yield Problem(*size, dtype=(BF16, F16)[(i + transposed) % 2], threshold=THRESHOLD, transposed=transposed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(threshold, transposed, x, w, a, b, dy, seed, bias=None):
    drop = mosaic_lora.Drop(seed, threshold) if threshold else None
    y, h = mosaic_lora.forward(x, w, a, b, drop, transposed=transposed, bias=bias)
    dx, da, db = mosaic_lora.backward(dy, x, w, a, b, h, drop, transposed=transposed)
    return {"y": y, "x": dx, "a": da, "b": db}


@pytest.mark.gpu
@pytest.mark.parametrize("problem", list(problems()), ids=str)
def test_linear(problem):
    """Within the bound, the same bits twice, and nothing of what lay in the buffers before."""
    x, w, a, b, dy = problem.operands()
    operands = [jnp.asarray(v) for v in (x, problem.stored(w), a, b, dy)]
    run = functools.partial(both, problem.threshold, problem.transposed, bias=problem.bias())
    seed = jnp.asarray(seed_words())

    # Whatever a kernel fails to write would now hold NaN, the next time that these buffers are handed out.
    poisoned = run(*(jnp.full_like(v, jnp.nan) for v in operands), seed)
    assert all(np.isnan(np.asarray(v, np.float32)).any() for v in poisoned.values())
    del poisoned
    first = run(*operands, seed)
    second = run(*operands, seed)
    for name in first:
        assert np.array_equal(np.asarray(first[name], np.float32), np.asarray(second[name], np.float32)), name
    problem.check(first)


GROUPS = [
    GroupProblem(1001, 1000, (1111, 300, 999), (5, 9, 16), BF16, THRESHOLD),
    GroupProblem(2048, 1024, (2048, 512, 512), (16, 16, 16)),
    GroupProblem(256, 4096, (1024, 512), (8, 8), F16),  # few rows, where K is split
    GroupProblem(1000, 2112, (1088, 448), (20, 64), F16, THRESHOLD),
    GroupProblem(777, 1024, (640, 640), (128, 100), BF16, THRESHOLD),
    GroupProblem(1024, 640, (512, 512, 512, 512), (64, 64, 64, 64)),
]


@functools.partial(jax.jit, static_argnums=0)
def both_of_group(threshold, x, ws, a_s, b_s, biases, dys, seed):
    drop = mosaic_lora.Drop(seed, threshold) if threshold else None
    ys, h = mosaic_group.forward(x, ws, a_s, b_s, drop, biases=biases)
    dx, das, dbs = mosaic_group.backward(dys, x, ws, a_s, b_s, h, drop)
    return dx, ys, das, dbs


@pytest.mark.gpu
@pytest.mark.parametrize("problem", GROUPS, ids=str)
def test_group(problem):
    """As one linear."""
    operands = jax.tree.map(jnp.asarray, problem.operands())
    seed = jnp.asarray(seed_words())
    poisoned = both_of_group(problem.threshold, *jax.tree.map(lambda v: jnp.full_like(v, jnp.nan), operands), seed)
    assert all(np.isnan(np.asarray(v, np.float32)).any() for v in jax.tree.leaves(poisoned))
    del poisoned
    first, second = (both_of_group(problem.threshold, *operands, seed) for _ in range(2))
    for one, other in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        assert np.array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    problem.check(*first)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["x", "a", "b"])
def test_one_gradient_alone(wanted):
    problem = Problem(1000, 1024, 1040, 20, threshold=THRESHOLD)
    x, w, a, b, dy = (jnp.asarray(v) for v in problem.operands())
    drop = mosaic_lora.Drop(jnp.asarray(seed_words()), THRESHOLD)
    wants = mosaic_lora.Wants(**{name: name == wanted for name in "xab"})

    @jax.jit
    def gradients(x, w, a, b, dy):
        h = mosaic_lora.forward(x, w, a, b, drop)[1]
        return dict(zip("xab", mosaic_lora.backward(dy, x, w, a, b, h, drop, wants=wants), strict=True))

    found = gradients(x, w, a, b, dy)
    assert [name for name, value in found.items() if value is not None] == [wanted]
    problem.check({wanted: found[wanted]})
