"""`lora_dot` with a bias: added once, before the sum is rounded, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax import reference
from lora_jax.ops import lora_dot
from tests.core.harness import cast, normal
from tests.kernels import reference_kernels

BF16 = ml_dtypes.bfloat16
M, K, N, R, SCALE = 12, 40, 24, 3, 2.7


def operands(dtype, bias_dtype):
    x, w = cast(normal(3, M // 3, K), dtype), cast(normal(K, N), dtype)
    a, b = cast(normal(K, R) / 2, np.float32), cast(normal(R, N), np.float32)
    return x, w, a, b, cast(10 * normal(N), bias_dtype)


@pytest.mark.parametrize(
    "implementation, dtype, bias_dtype",
    [
        ("xla", np.float32, np.float32),
        ("xla", BF16, np.float32),
        ("reference", BF16, BF16),
        ("reference", np.float16, np.float32),
        ("reference", BF16, np.float16),  # neither the data's dtype nor float32: made the latter
    ],
)
def test_values_and_gradients(implementation, dtype, bias_dtype):
    x, w, a, b, bias = operands(dtype, bias_dtype)
    dy = cast(normal(3, M // 3, N, seed=3), dtype)

    @jax.jit
    def run(x, w, a, b, bias):
        def dot(*v):
            return lora_dot(*v[:4], bias=v[4], scale=SCALE, implementation=implementation)

        y, vjp = jax.vjp(dot, x, w, a, b, bias)
        return y, vjp(dy)

    with reference_kernels.installed() as calls:
        y, gradients = run(x, w, a, b, bias)
        assert bool(calls) == (implementation == "reference")
    bound = reference.tolerance(dtype, K + R)
    want, magnitude = reference.lora_dot(x, w, a, b, SCALE, bias=bias)
    assert y.dtype == dtype and reference.excess(y, want, bound * magnitude) <= 1
    wide = np.asarray(bias, np.float64)
    for wrong in (want - wide, want + wide, reference.lora_dot(x, w, a, 0 * b, SCALE, bias=bias)[0]):
        assert reference.excess(wrong, want, bound * magnitude) > 1
    wanted = reference.lora_dot_gradients(x, w, a, b, SCALE, dy)
    for name, got, leaf in zip(("x", "w", "a", "b", "bias"), gradients, (x, w, a, b, bias), strict=True):
        want, magnitude = wanted[name]
        # Each is rounded to its operand's dtype, on top of what its own product is.
        bound = (reference.tolerance(dtype, K + N + M) + reference.unit_roundoff(leaf.dtype)) * magnitude
        assert got.dtype == leaf.dtype and reference.excess(got, want, bound) <= 1, name
        assert reference.excess(want / 2, want, bound) > 1, name


def test_its_gradient_is_summed_in_float32():
    """4096 rows of 1 + 1/64 in bfloat16: a bfloat16 sum of them would stick at a few hundred."""
    rows = 4096
    x, w, a, b = jnp.zeros((rows, 4), BF16), jnp.zeros((4, 8), BF16), jnp.zeros((4, 1)), jnp.zeros((1, 8))
    bias = jnp.zeros(8)
    _, vjp = jax.vjp(lambda bias: lora_dot(x, w, a, b, bias=bias), bias)
    (got,) = vjp(jnp.full((rows, 8), 1 + 1 / 64, BF16))
    assert reference.excess(got, np.full(8, rows * (1 + 1 / 64)), 1e-6 * rows) <= 1


def test_a_frozen_bias_costs_no_sum():
    x, w, a, b, bias = operands(np.float32, np.float32)

    def sums(argnums):
        gradient = jax.grad(lambda x, bias: lora_dot(x, w, a, b, bias=bias).sum(), argnums)
        # Once for the loss; and for the bias' gradient.
        return str(jax.make_jaxpr(gradient)(x, bias)).count("reduce_sum")

    assert sums((0, 1)) == sums(0) + 1


def test_a_zero_adapter_gives_the_layers_own_bits():
    """As Flax' `Dense` adds it, after the product is rounded."""
    x, w, a, b, bias = operands(BF16, BF16)
    got = jax.jit(lambda *v: lora_dot(*v, bias=bias, implementation="xla"))(x, w, a, 0 * b)
    base = jax.jit(lambda x, w: x @ w + bias)(x, w)
    assert np.array_equal(np.asarray(got, np.float32), np.asarray(base, np.float32))
    assert not np.array_equal(np.asarray(got, np.float32), np.asarray(x @ w, np.float32))


def test_shape():
    x, w, a, b, bias = operands(np.float32, np.float32)
    with pytest.raises(ValueError, match=r"`bias` has shape \(23,\); expected \(24,\), of kernel \(40, 24\)"):
        lora_dot(x, w, a, b, bias=bias[1:])
