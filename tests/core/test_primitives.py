"""Equations that the interpreter has no rule for: run as they are on data, and on weights with the weight formed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.core.harness import check, normal

X = normal(4, 6)
W = {"w": normal(6, 6)}


@jax.custom_batching.custom_vmap
def sine(x):
    return jnp.sin(x)


sine.def_vmap(lambda size, batched, x: (jnp.sin(x), True))


@jax.custom_batching.custom_vmap
def product(x, w):
    return jnp.tanh(x @ w)


product.def_vmap(lambda size, batched, x, w: (jnp.tanh(x @ w), True))


def root(p, x):
    """`z` with z**3 + z = x·W, differentiated implicitly."""
    y = x @ p["w"]

    def solve(f, z):
        return lax.fori_loop(0, 30, lambda i, z: z - f(z) / (3 * z**2 + 1), z)

    return lax.custom_root(lambda z: z**3 + z - y, jnp.zeros_like(y), solve, lambda g, y: y / g(jnp.ones_like(y)))


def solved(p, x):
    """A weight inside a custom linear solve."""
    matrix = 9 * jnp.eye(6) + 0.1 * p["w"]
    found = lax.custom_linear_solve(
        lambda v: matrix @ v, x[0], lambda _, b: jnp.linalg.solve(matrix, b),
        transpose_solve=lambda _, b: jnp.linalg.solve(matrix.T, b),
    )  # fmt: skip
    return found + (x @ p["w"])[0]


@jax.custom_gradient
def custom(x, w):
    return x @ w, lambda g: (2 * g @ w.T, 3 * x.T @ g)


def called_back(p, x):
    y = x @ p["w"]
    return jax.pure_callback(lambda v: np.asarray(v) * 2, jax.ShapeDtypeStruct(y.shape, y.dtype), y)


# name: (function, whether it has a gradient, primitives that form the weight)
CASES = {
    "callback": (called_back, False, []),
    "custom_vmap, vmapped": (lambda p, x: jax.vmap(sine)(x @ p["w"]), True, []),
    "custom_vmap": (lambda p, x: sine(x @ p["w"]), False, []),
    "custom_vmap of a weight": (lambda p, x: product(x, p["w"]) + x @ p["w"], False, ["custom_vmap_call"]),
    "custom_root": (root, True, []),
    "custom_linear_solve": (solved, True, ["add"]),
    "custom_gradient": (lambda p, x: custom(x, p["w"]), True, []),
    "sort": (lambda p, x: lax.sort((x @ p["w"], x), num_keys=1)[1] * (x @ p["w"]), True, []),
    "fft": (lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x @ p["w"]) * 2), True, []),
    "reduce_window": (lambda p, x: lax.reduce_window(x @ p["w"], 0.0, lax.add, (2, 2), (1, 1), "SAME"), True, []),
    "scatter": (lambda p, x: jnp.zeros((9, 6), x.dtype).at[np.array([1, 3, 1, 2])].add(x @ p["w"]), True, []),
    "top_k": (lambda p, x: lax.top_k(x @ p["w"], 2)[0], True, []),
    "attention": (lambda p, x: jax.nn.dot_product_attention(*3 * ((x @ p["w"]).reshape(1, 4, 2, 3),)), True, []),
    "composite": (lambda p, x: lax.composite(jnp.tanh, "my.tanh")(x @ p["w"]), False, []),
    "composite of a weight": (
        lambda p, x: lax.composite(lambda a, w: jnp.tanh(a @ w), "my.product")(x, p["w"]) + x @ p["w"],
        False,
        ["composite"],
    ),
    "reduce_precision": (lambda p, x: x @ lax.reduce_precision(p["w"], 11, 50), True, ["reduce_precision"]),
}


@pytest.mark.parametrize("name", CASES)
def test_primitive(name):
    fn, differentiable, formed = CASES[name]
    check(fn, W, X, gradients=differentiable, materialised=formed)
