"""Parameters written side by side before they are used: right, formed in full, and reported."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from tests.core.harness import check, config, normal

PARAMS = {"a": normal(6, 5), "b": normal(6, 4)}
SQUARE = {"a": normal(6, 6), "b": normal(6, 6, seed=1)}
X = normal(4, 6)


JOINS = {
    "outputs": (lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1), PARAMS, "io", "concatenate"),
    "transposed": (lambda p, x: x @ jnp.concatenate([p["a"].T, p["b"].T]).T, PARAMS, "io", "concatenate"),
    "inputs": (lambda p, x: jnp.tile(x, 2) @ jnp.concatenate([p["a"], p["b"]]), SQUARE, "io", "concatenate"),
    "a part of it": (lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1)[:, 2:8], PARAMS, "io", "concatenate"),
    "padded": (
        lambda p, x: x @ jnp.pad(p["a"], ((0, 0), (1, 2)))[:, :7] @ jnp.pad(p["b"], ((0, 1), (0, 3))),
        PARAMS, "io", "pad",
    ),
    "scanned": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack([p["a"], p["b"]]))[0],
        SQUARE, "io", "stack",
    ),
    "einsum of a stack": (
        lambda p, x: jnp.einsum("bd,kfd->bkf", x, jnp.stack([p["a"], p["b"]])), SQUARE, "oi", "stack",
    ),
    "twice": (
        lambda p, x: x @ jnp.concatenate([jnp.concatenate([p["a"], p["b"]], 1)] * 2, axis=1), PARAMS, "io",
        "concatenate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINS)
def test_join(name):
    fn, params, roles, primitive = JOINS[name]
    plan = check(fn, params, X, materialised=[primitive])
    assert [site.roles for site in plan.sites] == [roles, roles]


def test_linen_optimized_lstm():
    cell = nn.OptimizedLSTMCell(5)
    inputs, carry = normal(2, 3), (normal(2, 5), normal(2, 5, seed=1))
    params = jax.tree.map(np.asarray, cell.init(jax.random.key(0), carry, inputs))

    def fn(params, carry, inputs):
        return cell.apply(params, carry, inputs)

    plan = check(fn, params, carry, inputs, materialised=["concatenate"], target_modules="all-linear")
    assert len(plan.sites) == 8 and {site.roles for site in plan.sites} == {"io"}


def test_straight_through_estimator():
    def fn(p, x):
        w = p["a"]
        return x @ (w + lax.stop_gradient(jnp.round(4 * w) / 4 - w))

    plan = lj.plan(fn, {"a": PARAMS["a"]}, X, config=config())
    assert plan.sites[0].roles == "io" and plan.materialised


def test_learnt_tokens_are_data():
    """Tokens joined from two parameters and multiplied by a kernel: the kernel is the weight."""
    params = {"kernel": normal(6, 6), "one": normal(1, 6), "two": normal(3, 6)}

    def fn(p):
        return jnp.concatenate([p["one"], p["two"]]) @ p["kernel"]

    plan = check(fn, params, target_modules=["kernel"], forms_weight=True)
    assert plan.sites[0].roles == "io"
