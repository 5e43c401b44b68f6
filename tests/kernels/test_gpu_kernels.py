"""Each family of kernels on a GPU of its own, at sizes that keep all of it busy: `pytest -m gpu tests/kernels`.

`-k triton` runs those in Triton alone, which also run on Ampere and Ada GPUs and need jax-triton.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels import mosaic_group, mosaic_lora, mosaic_many, tuned, tuning_cache
from lora_jax.ops import tune
from lora_jax.ops.families import FAMILIES, kernels
from tests.kernels.many_problem import ManyProblem
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


def cases():
    """Triton compiles each of these anew, for seconds each: every size once, and some that only these kernels take."""
    for problem in problems():
        yield "mosaic_gpu", problem
    for i, size in enumerate([*SIZES, (1, 16, 16, 1), (3, 130, 70, 7), (64, 2048, 40, 16)]):
        dtype, threshold = (BF16, F16)[i // 2 % 2], (THRESHOLD, THRESHOLD, 0)[i % 3]
        yield "triton", Problem(*size, dtype=dtype, threshold=threshold, transposed=i % 2 == 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def both(family, threshold, transposed, x, w, a, b, dy, seed, bias=None):
    module = kernels(family)
    drop = module.Drop(seed, threshold) if threshold else None
    y, h = module.forward(x, w, a, b, drop, transposed=transposed, bias=bias)
    dx, da, db = module.backward(dy, x, w, a, b, h, drop, transposed=transposed)
    return {"y": y, "x": dx, "a": da, "b": db}


@pytest.mark.gpu
@pytest.mark.parametrize("family, problem", list(cases()), ids=str)
def test_linear(family, problem):
    """Within the bound, the same bits twice, and nothing of what lay in the buffers before."""
    x, w, a, b, dy = problem.operands()
    operands = [jnp.asarray(v) for v in (x, problem.stored(w), a, b, dy)]
    run = functools.partial(both, family, problem.threshold, problem.transposed, bias=problem.bias())
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


@functools.partial(jax.jit, static_argnums=0)
def each_run(transposed, x, w, a, b, dy):
    y, h = mosaic_many.forward(x, w, a, b, transposed=transposed)
    dx, da, db = mosaic_many.backward(dy, x, w, a, b, h, transposed=transposed)
    return {"y": y, "x": dx, "a": da, "b": db}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "problem",
    [
        ManyProblem(4, 256, 1024, 2048, 16),
        ManyProblem(7, 128, 2112, 1088, 5, transposed=True),
        ManyProblem(3, 512, 640, 1280, 40, transposed=True),
        ManyProblem(4, 128, 2048, 1024, 200, dtype=F16),
    ],
    ids=str,
)
def test_factors_of_each_run(problem):
    """Within the bound, the same bits twice, and nothing of what lay in the buffers before."""
    x, w, a, b, dy = (jnp.asarray(v) for v in problem.operands().values())
    operands = x, w.T if problem.transposed else w, a, b, dy
    poisoned = each_run(problem.transposed, *(jnp.full_like(v, jnp.nan) for v in operands))
    assert all(np.isnan(np.asarray(v, np.float32)).any() for v in poisoned.values())
    del poisoned
    first, second = (each_run(problem.transposed, *operands) for _ in range(2))
    for name in first:
        assert np.array_equal(np.asarray(first[name], np.float32), np.asarray(second[name], np.float32)), name
    problem.check(first)


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
def test_more_rows_of_tiles_than_clusters():
    """Each cluster then computes the thin product of several row blocks before any other tile."""
    problem = Problem(17408, 640, 512, 16, threshold=THRESHOLD)
    operands = [jnp.asarray(v) for v in problem.operands()]
    found = both("mosaic_gpu", THRESHOLD, False, *operands, jnp.asarray(seed_words()))
    # Sums over so many rows are too inexact for half of one to be told from the whole: not of A and B.
    problem.check({name: found[name] for name in "yx"})


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", ["x", "a", "b"])
def test_one_gradient_alone(wanted, family):
    module = kernels(family)
    problem = Problem(1000, 1024, 1040, 20, threshold=THRESHOLD)
    x, w, a, b, dy = (jnp.asarray(v) for v in problem.operands())
    drop = module.Drop(jnp.asarray(seed_words()), THRESHOLD)
    wants = module.Wants(**{name: name == wanted for name in "xab"})

    @jax.jit
    def gradients(x, w, a, b, dy):
        h = module.forward(x, w, a, b, drop)[1]
        return dict(zip("xab", module.backward(dy, x, w, a, b, h, drop, wants=wants), strict=True))

    found = gradients(x, w, a, b, dy)
    assert [name for name, value in found.items() if value is not None] == [wanted]
    problem.check({wanted: found[wanted]})


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_tune(rate, tmp_path, monkeypatch):
    """Every candidate compiles and is right, and what won is used from then on."""
    monkeypatch.setattr(tuning_cache, "path", lambda: tmp_path / "tuned.json")
    told: list[str] = []
    found = tune([(2048, 1024, 2048, 16)], dropout_rate=rate, calls=2, report=told.append)
    assert not [line for line in told if line.startswith("left out")]
    assert {kernel for _, kernel, _ in found} == {"mosaic_gemm", "mosaic_down", "mosaic_outer", "implementation"}
    tuning_cache.reread()
    for (device, kernel, shape), entry in found.items():
        assert device == jax.devices()[0].device_kind and tuning_cache.find(device, kernel, shape) == entry
        if kernel == "mosaic_gemm":
            options = {"dropped": shape.dropped, "transposed": shape.transposed}
            config = tuned.gemm_config(shape.m, shape.k, shape.n, shape.rank, **options)
            assert tuned.tiles_of(config) == entry["config"]
