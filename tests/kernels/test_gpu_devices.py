"""The Hopper kernels on several GPUs of one host: each on its own part of the operands, against float64."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.ops import lora_dot
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.many import Many, many_contract
from tests.kernels.many_problem import ManyProblem
from tests.kernels.problems import Problem

# Specs of x, W, A, B and dy over a mesh of two.
CASES = {
    "data": (P("d"), P(), P(), P(), P("d")),
    "column": (P(), P(None, "d"), P(), P(None, "d"), P(None, "d")),
    "row": (P(None, "d"), P("d"), P("d"), P(), P()),
}


@pytest.fixture
def two_gpus():
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    return jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])


def placed(mesh, values, specs):
    return [jax.device_put(jnp.asarray(v), NamedSharding(mesh, s)) for v, s in zip(values, specs, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_product_split_over_gpus(case, two_gpus):
    problem = Problem(2048, 1024, 2048, 16)

    @jax.jit
    def run(x, w, a, b, dy):
        y, back = jax.vjp(lambda x, a, b: lora_dot(x, w, a, b, implementation="mosaic_gpu"), x, a, b)
        return dict(zip("yxab", (y, *back(dy)), strict=True))

    x, w, a, b, dy = problem.operands()
    factors = (a.astype(np.float32), b.astype(np.float32))
    compiled = run.lower(*placed(two_gpus, (x, w, *factors, dy), CASES[case])).compile()
    assert len(re.findall(r"custom-call.*mosaic", compiled.as_text())) >= 3
    problem.check(compiled(*placed(two_gpus, (x, w, *factors, dy), CASES[case])))


@pytest.mark.gpu
def test_rows_with_an_adapter_each_split_over_gpus(two_gpus):
    problem = ManyProblem(4, 256, 1024, 2048, 16)
    spec = Contraction(x=("t", "k"), w=("k", "n"), first=("k", "r"), second=("r", "n"), y=("t", "n"))
    many = Many(("k", "slot", "r"), ("slot", "r", "n"), problem.runs, "fused")
    one = functools.partial(many_contract, spec, many)

    @jax.jit
    def run(x, w, a, b, dy):
        def rows(x, a, b):
            scale, ids = jnp.ones(problem.runs), jnp.arange(problem.runs)
            return jax.vmap(lambda x, i: one(x, w, a, b, scale, i, None))(x, ids)

        y, back = jax.vjp(rows, x, a, b)
        return dict(zip("yxab", (y, *back(dy)), strict=True))

    v = problem.operands()
    stack = np.swapaxes(v["a"].astype(np.float32), 0, 1), v["b"].astype(np.float32)
    x, dy = (v[name].reshape(problem.runs, problem.run, -1) for name in ("x", "dy"))
    found = run(*placed(two_gpus, (x, v["w"], *stack, dy), (P("d"), P(), P(), P(), P("d"))))
    found["a"] = np.swapaxes(found["a"], 0, 1)
    problem.check({name: np.asarray(got).reshape(problem.answers()[name][0].shape) for name, got in found.items()})
