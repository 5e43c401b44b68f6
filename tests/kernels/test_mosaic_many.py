"""The Hopper kernels for an adapter of each run of rows, under Pallas' GPU interpreter, and what they refuse."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax.kernels import mosaic_many
from tests.kernels.many_problem import ManyProblem

OPTIONS = {"sms": 2, "interpret": plgpu.InterpretGPUParams()}


@pytest.mark.parametrize(
    "problem",
    [ManyProblem(2, 128, 320, 384, 5), ManyProblem(2, 256, 320, 320, 20, transposed=True)],
    ids=str,
)
def test_against_float64(problem):
    x, w, a, b, dy = (jnp.asarray(v) for v in problem.operands().values())
    w = w.T if problem.transposed else w
    y, h = mosaic_many.forward(x, w, a, b, transposed=problem.transposed, **OPTIONS)
    dx, da, db = mosaic_many.backward(dy, x, w, a, b, h, transposed=problem.transposed, **OPTIONS)
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
    problem.check({"y": y, "x": dx, "a": da, "b": db})


def test_only_what_is_wanted():
    problem = ManyProblem(2, 128, 320, 320, 16)
    x, w, a, b, dy = (jnp.asarray(v) for v in problem.operands().values())
    h = (x.reshape(2, 128, 320) @ a).reshape(256, 16).T
    wants = mosaic_many.Wants(x=False, a=True, b=False)
    dx, da, db = mosaic_many.backward(dy, x, w, a, b, h, wants=wants, **OPTIONS)
    assert dx is None and db is None
    problem.check({"a": da})


@pytest.mark.parametrize(
    "m, k, runs, dtype, why",
    [
        (256, 512, 4, "bfloat16", "runs of 64 of M=256 rows"),
        (300, 512, 7, "bfloat16", "300 rows are not 7 equal runs"),
        (256, 128, 2, "bfloat16", "shorter than the ring"),
        (256, 512, 2, "float32", "float32 operands"),
    ],
)
def test_refused(m, k, runs, dtype, why):
    assert why in mosaic_many.unsupported(m, k, 512, 16, runs, dtype)
    assert mosaic_many.unsupported(256, 512, 512, 16, 2, "bfloat16") is None
