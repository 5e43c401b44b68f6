"""`lora_swiglu`: values and gradients, and what it keeps between the passes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import reference
from lora_jax.ops import LoraKernel, lora_dot, lora_dot_group, lora_swiglu
from tests.core.harness import cast, normal
from tests.kernels import reference_kernels
from tests.kernels.test_dispatch import BF16, KEY, RATE
from tests.kernels.test_group import products

M, D, F = 32, 24, 80


def layer(k, n, rank, seed, dtype, bias=False):
    factors = normal(k, rank, seed=seed) / 2, normal(rank, n, seed=seed + 1)
    bias = cast(normal(n, seed=seed + 2), np.float32) if bias else None
    w = cast(normal(k, n, seed=seed + 3) / 4, dtype)
    return LoraKernel(w, *(cast(v, np.float32) for v in factors), bias, 0.5)


def operands(dtype=np.float32):
    x = cast(normal(M, D), dtype)
    return x, layer(D, F, 3, 10, dtype, bias=True), layer(D, F, 2, 20, dtype), layer(F, D, 4, 30, dtype)


def written_out(x, gate, up, down):
    """The same layer of separate products, as models have it."""
    opened, raised = (lora_dot(x, v.kernel, v.a, v.b, bias=v.bias, scale=v.scale) for v in (gate, up))
    return lora_dot(jax.nn.silu(opened) * raised, down.kernel, down.a, down.b, scale=down.scale)


def silu(v):
    sigmoid = 1 / (1 + np.exp(-v))
    return v * sigmoid, sigmoid * (1 + v * (1 - sigmoid))


def wide(layer):
    return [np.asarray(v, np.float64) for v in layer[:3]] + [layer.scale]


def exact(x, gate, up, down, dy):
    """`{name: (value, size)}` of the result and the gradients; the sizes are the same sums over magnitudes."""
    x, dy, bias = (np.asarray(v, np.float64) for v in (x, dy, 0.0 if gate.bias is None else gate.bias))
    (opened, s1), (raised, s2) = (
        reference.lora_dot(x, *wide(v), bias=b) for v, b in ((gate, bias), (up, 0.0))
    )  # fmt: skip
    acted, slope = silu(opened)
    hidden, s3 = acted * raised, s1 * s2  # |silu(v)| <= |v|
    y = reference.lora_dot(hidden, *wide(down))[0], reference.lora_dot(s3, *map(np.abs, wide(down)))[1]
    of_down = reference.lora_dot_gradients(hidden, *wide(down), dy)
    sizes = reference.lora_dot_gradients(s3, *wide(down), dy)
    dh, s4 = of_down["x"]
    of_gate, of_up = (
        (reference.lora_dot_gradients(x, *wide(v), d), reference.lora_dot_gradients(x, *wide(v), s))
        for v, d, s in ((gate, dh * raised * slope, 1.1 * s4 * s2 * (1 + s1)), (up, dh * acted, s4 * s1))
    )
    found = {"y": y, "x": (of_gate[0]["x"][0] + of_up[0]["x"][0], of_gate[1]["x"][1] + of_up[1]["x"][1])}
    for name, values, bounds in (("gate", *of_gate), ("up", *of_up), ("down", of_down, sizes)):
        found |= {f"{name}.{leaf}": (values[leaf][0], bounds[leaf][1]) for leaf in "ab"}
    return found


def run(fn, x, gate, up, down, dy):
    def of_leaves(x, gate, up, down):
        return fn(x, gate, up, down)

    y, vjp = jax.vjp(of_leaves, x, gate, up, down)
    dx, *layers = vjp(dy)
    found = {"y": y, "x": dx}
    for name, gradient in zip(("gate", "up", "down"), layers, strict=True):
        found |= {f"{name}.a": gradient.a, f"{name}.b": gradient.b}
    return found


@pytest.mark.parametrize("dtype, implementation", [(np.float32, "xla"), (BF16, "reference")])
def test_values_and_gradients(dtype, implementation):
    given = operands(dtype)
    dy = cast(normal(M, D, seed=3), dtype)
    layers = [v._replace(scale=jnp.float32(v.scale)) for v in given[1:]]
    with reference_kernels.installed() as calls:
        got = jax.jit(lambda *v: run(lambda *u: lora_swiglu(*u, implementation=implementation), *v))(
            given[0], *layers, dy
        )
        assert ({size for _, size in calls} == {(M, D, F, F), (M, F, D, 4)}) == (implementation == "reference")
    answers = exact(*given, dy)
    # Three products and an activation one after another, each with the error of one.
    relative = 4 * reference.tolerance(dtype, D + F + M)
    x, gate, up, down = given
    mistakes = [
        exact(x, gate._replace(b=0 * gate.b), up, down, dy),
        exact(x, gate, up._replace(scale=1.0), down, dy),
        exact(x, gate, up, down._replace(b=0 * down.b), dy),
        exact(x, gate._replace(bias=None), up, down, dy),
    ]
    for name, (want, size) in answers.items():
        assert reference.excess(got[name], want, relative * size) <= 1, name
    if dtype == np.float32:
        for wrong in mistakes:
            assert reference.excess(wrong["y"][0], answers["y"][0], relative * answers["y"][1]) > 1


def test_another_activation_and_masks():
    """One mask for gate and up, another for down, as the products that it is made of give them."""
    x, gate, up, down = operands()
    first, second = jax.random.split(KEY)
    drops = {"dropout_rate": RATE, "key": first}
    kernels, a_s, b_s, biases, scales = zip(gate, up, strict=True)
    opened, raised = lora_dot_group(x, kernels, a_s, b_s, biases=biases, scale=scales, **drops)
    drops["key"] = second
    want = lora_dot(jax.nn.gelu(opened) * raised, down.kernel, down.a, down.b, scale=down.scale, **drops)
    got = lora_swiglu(x, gate, up, down, activation=jax.nn.gelu, dropout_rate=RATE, key=KEY)
    bound = reference.tolerance(np.float32, D + F) * np.abs(want).max()
    assert reference.excess(got, np.asarray(want, np.float64), bound) <= 1
    for other in (lora_swiglu(x, gate, up, down, dropout_rate=RATE, key=KEY), lora_swiglu(x, gate, up, down)):
        assert reference.excess(other, np.asarray(want, np.float64), bound) > 1


def kept(fn, x, layers):
    """Arrays between the passes, beside the operands."""

    def of_factors(x, factors):
        return fn(x, *(layer._replace(a=a, b=b) for layer, (a, b) in zip(layers, factors, strict=True)))

    _, vjp = jax.vjp(jax.jit(of_factors), x, [(v.a, v.b) for v in layers])
    each = {id(v): v for v in jax.tree.leaves(vjp)}
    return list(each.values())


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_what_is_kept(dtype):
    """x, the results of gate and up, and three thin ones; written out, at least three more as wide."""
    x, *layers = operands(dtype)

    def size(arrays):
        """Bytes that depend on the number of rows."""
        return sum(v.nbytes for v in arrays if v.shape[0] == M)

    ours, plain = kept(lora_swiglu, x, layers), kept(written_out, x, layers)
    ranks = sum(v.a.shape[1] for v in layers)
    itemsize = np.dtype(dtype).itemsize
    assert size(ours) == M * (D + 2 * F + ranks) * itemsize
    assert size(plain) >= M * (D + 5 * F + ranks) * itemsize


def test_nothing_wide_is_multiplied_twice():
    """Three products forward, three back; what is computed again is elementwise."""
    x, *layers = operands()

    found = products(jax.make_jaxpr(jax.grad(lambda x: lora_swiglu(x, *layers).sum()))(x).jaxpr)
    assert sum(bool({*pair} & {(D, F), (F, D)}) for pair in found) == 6, found
