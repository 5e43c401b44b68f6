"""`implementation="triton"`: from `lora_dot` to the kernels' launches, with the kernels interpreted."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import reference
from lora_jax.ops import explain, lora_dot
from tests.core.harness import cast, normal
from tests.kernels import interpreted, reference_kernels
from tests.kernels.problems import F16, Problem, drawn, mask, seed_words

pytest.importorskip("torch")
pytest.importorskip("triton")

THRESHOLD = 13107


@pytest.fixture
def kernels():
    with interpreted.installed() as module:
        yield module


def both(kernels, problem, **wants):
    x, w, a, b, dy = problem.operands()
    drop = kernels.Drop(jnp.asarray(seed_words()), problem.threshold) if problem.threshold else None

    @jax.jit
    def run(x, w, a, b, dy):
        y, h = kernels.forward(x, w, a, b, drop, transposed=problem.transposed)
        asked = kernels.Wants(**wants)
        dx, da, db = kernels.backward(dy, x, w, a, b, h, drop, transposed=problem.transposed, wants=asked)
        return {"y": y, "x": dx, "a": da, "b": db}

    return run(x, problem.stored(w), a, b, dy)


# Odd sizes cross every tile edge; few rows and few columns split the sums; ranks on both sides of every padding.
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("threshold", [0, THRESHOLD])
@pytest.mark.parametrize("size", [(1, 300, 17, 1), (70, 45, 33, 5), (40, 72, 136, 70)], ids=str)
def test_values_and_gradients(kernels, size, threshold, transposed):
    problem = Problem(*size, dtype=F16, threshold=threshold, transposed=transposed)
    got = both(kernels, problem)
    assert [got[name].dtype for name in "yxab"] == [F16, F16, np.float32, np.float32]
    problem.check(got)


def test_split_sums_have_the_same_bits_each_time(kernels):
    problem = Problem(130, 300, 20, 4, dtype=F16, threshold=THRESHOLD)
    lies = kernels.plans.Matrix.row_major
    assert kernels.plans.down(lies(130, 300, 2), lies(300, 4, 2), 1.0, 0, 108).parts == 2
    assert kernels.plans.outer(lies(130, 4, 2), lies(130, 300, 2), 0, 108).parts == 2
    first, second = both(kernels, problem), both(kernels, problem)
    for name in first:
        assert np.array_equal(first[name], second[name]), name
    problem.check(first)


@pytest.mark.parametrize("wanted", ["x", "a", "b"])
def test_one_gradient_alone(kernels, wanted):
    problem = Problem(20, 48, 40, 3, dtype=F16, threshold=THRESHOLD)
    got = both(kernels, problem, **{name: name == wanted for name in "xab"})
    assert [name for name in "xab" if got[name] is not None] == [wanted]
    problem.check({wanted: got[wanted]})


@pytest.mark.parametrize("dtype", [F16, np.float32])
def test_bias(kernels, dtype):
    problem = Problem(40, 48, 40, 3, dtype=F16)
    x, w, a, b, _ = map(jnp.asarray, problem.operands())
    bias = cast(normal(40), dtype)
    (want, bound), exact = problem.answers()["y"], np.asarray(bias, np.float64)
    # The sum is one term longer and rounded once, as without.
    bound = bound + reference.tolerance(F16, 1) * abs(exact)
    y = kernels.forward(x, w, a, b, bias=bias)[0]
    assert reference.excess(y, want + exact, bound) <= 1
    for times in (0, 2):
        assert reference.excess(want + times * exact, want + exact, bound) > 1


def test_a_part_of_an_array_has_its_part_of_the_mask(kernels):
    x, w, a, b, dy = map(jnp.asarray, Problem(24, 140, 40, 3, dtype=F16).operands())
    part = kernels.Drop(jnp.asarray(seed_words(origin=(8, 128))), THRESHOLD)
    h = kernels.forward(x, w, a, b, part)[1]
    da = kernels.backward(dy, x, w, a, b, h, part)[1]
    rescaling = 65536 / (65536 - THRESHOLD)
    here, elsewhere = (
        reference.fused(x, w, a, b, dy, F16, 1.0, (drawn(x.shape, origin=origin) >= THRESHOLD) * rescaling)["a"]
        for origin in ((8, 128), (0, 0))
    )
    assert reference.excess(da, *here) <= 1 < reference.excess(elsewhere[0], *here)


def test_lora_dot_drops_what_xla_drops(kernels):
    """With several axes of rows, float32 factors and a scale, through the custom derivative."""
    key, rate, scale = jax.random.key(2), 0.25, 2.7
    x, w, dy = (cast(normal(*shape), F16) for shape in ((2, 3, 70), (70, 24), (2, 3, 24)))
    a, b = cast(normal(70, 3) / 2, np.float32), cast(normal(3, 24), np.float32)

    def run(implementation):
        def dot(x, a, b):
            return lora_dot(x, w, a, b, scale=scale, dropout_rate=rate, key=key, implementation=implementation)

        y, vjp = jax.vjp(dot, x, a, b)
        return y, vjp(dy)

    seed = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    keep = mask((6, 70), round(rate * 65536), (int(seed[0]), int(seed[1]))).reshape(x.shape)
    want, magnitude = reference.lora_dot(x, w, a, b, scale, keep)
    wanted = reference.lora_dot_gradients(x, w, a, b, scale, dy, keep)
    unmasked = reference.lora_dot_gradients(x, w, a, b, scale, dy)
    bound = reference.tolerance(F16, 70 + 24 + 6)
    for implementation in ("xla", "triton"):
        y, gradients = run(implementation)
        assert y.dtype == F16 and [g.dtype for g in gradients] == [F16, np.float32, np.float32]
        assert reference.excess(y, want, bound * magnitude) <= 1
        for name, got in zip("xab", gradients, strict=True):
            exact, size = wanted[name]
            assert reference.excess(got, exact, bound * size) <= 1, name
            assert reference.excess(unmasked[name][0], exact, bound * size) > 1, name
    assert reference.excess(reference.lora_dot(x, w, a, b, 1.0, keep)[0], want, bound * magnitude) > 1


def test_what_is_refused(kernels):
    assert kernels.unsupported(1, 1, 1, 256, jnp.bfloat16) is None
    assert kernels.unsupported(8, 8, 8, 257, jnp.bfloat16) == "rank 257; the kernels take 1 to 256"
    assert kernels.unsupported(8, 8, 8, 0, jnp.bfloat16) == "rank 0; the kernels take 1 to 256"
    assert kernels.unsupported(8, 0, 8, 4, jnp.float16) == "M=8, K=0, N=8: nothing to compute"
    assert "float32 operands" in kernels.unsupported(8, 8, 8, 4, jnp.float32)
    assert "33554432 x 64 elements" in kernels.unsupported(8, 8, 2**25, 64, jnp.float16)


def test_only_by_name_where_nothing_was_timed(kernels):
    v = [jax.ShapeDtypeStruct(shape, F16) for shape in ((8192, 4096), (4096, 4096), (4096, 16), (16, 4096))]
    choice = explain(*v)
    assert choice.implementation == "xla"
    assert choice.reasons["triton"].startswith("nobody has timed these kernels on cpu yet: ask for them by name")
    assert explain(*v, implementation="triton").implementation == "triton"


def test_jax_triton_leaves_no_trace_in_the_environment(monkeypatch):
    for value in (None, "/a/folder"):
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        if value:
            monkeypatch.setenv("TRITON_CACHE_DIR", value)
        with interpreted.installed():
            assert os.environ.get("TRITON_CACHE_DIR") == value


def test_devices():
    """Without jax-triton: a reason, with what to install, and never a choice."""
    v = [jax.ShapeDtypeStruct(shape, F16) for shape in ((256, 64), (64, 64), (64, 4), (4, 64))]
    for kind, capability, reason in [
        ("Tesla V100", (7, 0), "needs an Ampere, Ada or Hopper GPU; Tesla V100 has 7.0"),
        ("NVIDIA B200", (10, 0), "needs an Ampere, Ada or Hopper GPU; NVIDIA B200 has 10.0"),
    ]:
        with reference_kernels.pretending(kind, capability):
            assert explain(*v).reasons["triton"] == reason
            with pytest.raises(ValueError, match=reason):
                lora_dot(*v, implementation="triton")
