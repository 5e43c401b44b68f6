"""scan, while, fori_loop and map: weights as stacks, constants and carried values; bases are never copied."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from tests.core.dataflow import copied_bases, primitives
from tests.core.harness import cast, check, config, normal, random_adapter

STACK = {"w": normal(3, 6, 6) / 2, "b": normal(3, 6)}
ONE = {"w": normal(6, 6) / 2}
X = normal(4, 6)


def layer(x, p):
    return x + jnp.tanh(x @ p["w"] + p["b"]), x.sum()


def row(p, i):
    return jax.tree.map(lambda v: v[i], p)


def in_two_scans(p, x):
    first, rest = jax.tree.map(lambda v: v[:1], p), jax.tree.map(lambda v: v[1:], p)
    return lax.scan(layer, lax.scan(layer, x, first)[0], rest)


def handed_back(p, x):
    x, same = lax.scan(lambda x, q: (layer(x, q)[0], q), x, p)
    return layer(x, row(same, 1))


STACKED = {
    "scan": lambda p, x: lax.scan(layer, x, p),
    "reverse": lambda p, x: lax.scan(layer, x, p, reverse=True),
    "unrolled": lambda p, x: lax.scan(layer, x, p, unroll=2),
    "of jitted layers": lambda p, x: lax.scan(jax.jit(layer), x, p),
    "of remat layers": lambda p, x: lax.scan(jax.checkpoint(layer), x, p),
    "rows and steps": lambda p, x: lax.scan(lambda x, r: layer(x * r[1], r[0]), x, (p, jnp.arange(3.0))),
    "map": lambda p, x: lax.map(lambda q: layer(x, q)[0], p),
    "stack of casts": lambda p, x: lax.scan(layer, x, jax.tree.map(lambda v: v.astype(x.dtype), p)),
    "backwards": lambda p, x: lax.scan(layer, x, jax.tree.map(lambda v: v[::-1], p)),
    "indexed by the step": lambda p, x: lax.fori_loop(0, 3, lambda i, x: layer(x, row(p, i))[0], x),
    "in two scans": in_two_scans,
    "handed back": handed_back,
}


@pytest.mark.parametrize("name", STACKED)
def test_stack(name):
    """Each layer's A and B travel with its W."""
    plan = check(STACKED[name], STACK, X, target_modules=["w"])
    assert {s.name: (s.roles, s.a_shape) for s in plan.sites} == {"w": ("lio", (3, 6, 3))}


def test_stack_on_the_last_axis():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(p["w"], -1, 0))[0]

    assert check(fn, {"w": normal(6, 6, 3)}, X).sites[0].roles == "iol"


def test_scan_of_scans():
    def fn(p, x):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        return lax.scan(lambda x, ws: lax.scan(inner, x, ws), x, p["w"])[0]

    assert check(fn, {"w": normal(2, 3, 6, 6)}, X).sites[0].roles == "llio"


def test_scan_over_pairs_of_layers():
    """(4, ...) read as (2, 2, ...): the stacked axis itself is split."""

    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x, p["w"].reshape(2, 2, 6, 6))[0]

    assert check(fn, {"w": normal(4, 6, 6)}, X).sites[0].roles == "lio"


def test_scan_over_blocks_of_rows():
    """A product in blocks: the scanned axis is one that is summed."""

    def fn(p, x):
        blocks = (x.reshape(4, 3, 2).swapaxes(0, 1), p["w"].reshape(3, 2, 5))
        total = lax.scan(lambda acc, b: (acc + b[0] @ b[1], None), jnp.zeros((4, 5), x.dtype), blocks)[0]
        return total + jnp.tanh(x @ p["w"])

    check(fn, {"w": normal(6, 5)}, X)


def carry(wrap):
    def fn(p, x):
        def step(c, _):
            return wrap(lambda x, w: (jnp.tanh(x @ w), w))(*c), None

        x, w = lax.scan(step, (x, p["w"]), None, length=3)[0]
        return x @ w.T

    return fn


CONSTANT = {
    "closed over": lambda p, x: lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, None, length=3)[0],
    "carried": carry(lambda f: f),
    "carried through jit": carry(jax.jit),
    "carried through remat": carry(jax.checkpoint),
    "carried through both": carry(lambda f: jax.checkpoint(jax.jit(f))),
    "fori_loop": lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh((1 + i) * x @ p["w"]), x),
    "fori_loop, carried": lambda p, x: lax.fori_loop(0, 3, lambda _, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x, p["w"]))[0],
    "associative_scan beside": lambda p, x: lax.associative_scan(jnp.add, x @ p["w"]),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_weight_shared_by_steps(name):
    assert check(CONSTANT[name], ONE, X).sites[0].roles == "io"


def three_times(c):
    return c[0] < 3


def rows_of_different_length(p, x):
    def one(r, steps):
        return lax.while_loop(lambda c: c[0] < steps, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, r))[1]

    return jax.vmap(one)(x, jnp.array([0, 3, 1, 2]))


def until_large(p, x):
    def going(c):
        return ((c[1][:1] @ p["w"]).sum() < 5) & (c[0] < 9)

    return lax.while_loop(going, lambda c: (c[0] + 1, c[1] + 0.3 * jnp.abs(c[1] @ p["w"])), (0, x))[1]


def traced_bound(p, x):
    steps = 3 + (x[0, 0] > 100).astype(int)
    return lax.fori_loop(0, steps, lambda i, x: jnp.tanh(x @ p["w"]), x)


WHILE = {
    "closed over": lambda p, x: lax.while_loop(three_times, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1],
    "carried": lambda p, x: lax.while_loop(
        three_times, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2]), (0, x, p["w"])
    )[1],
    "in the condition": until_large,
    "fori_loop with a traced bound": traced_bound,
    "vmapped": rows_of_different_length,
}


@pytest.mark.parametrize("name", WHILE)
def test_while(name):
    check(WHILE[name], ONE, X, gradients=False)


def test_a_carried_weight_that_changes_is_formed():
    def fn(p, x):
        def step(c, _):
            x, w = c
            return (jnp.tanh(x @ w), 0.9 * w), None

        return lax.scan(step, (x @ p["w"], p["w"]), None, length=3)[0][0]

    check(fn, ONE, X, materialised=["scan"])


def test_weights_that_swap_places_are_formed():
    def fn(p, x):
        def step(c, _):
            x, v, w = c
            return (jnp.tanh(x @ v), w, v), None

        return lax.scan(step, (x @ p["v"] @ p["w"], p["v"], p["w"]), None, length=3)[0][0]

    check(fn, {"v": normal(6, 6), "w": normal(6, 6, seed=1)}, X, materialised=["scan"])


def deep(p, x):
    return lax.scan(layer, x, p)[0].sum()


def test_scanned_bases_are_not_copied():
    """Neither stacked, joined, broadcast nor updated: on the jaxpr, gradients included."""
    params, x = cast(STACK, np.float32), jnp.asarray(X)
    plan = lj.plan(deep, params, x, config=config())
    adapter = random_adapter(plan, np.float32)
    adapted = lj.apply(deep, plan)
    size = params["w"].size // 3
    assert not copied_bases(adapted, params, adapter, (x,), size)
    gradient = jax.grad(adapted, argnums=1)
    assert not copied_bases(gradient, params, adapter, (x,), size)

    def restacked(params, adapter, x):
        return adapted({**params, "w": jnp.stack([params["w"][i] for i in range(3)])}, adapter, x)

    assert copied_bases(restacked, params, adapter, (x,), size)  # and the check would see it
    assert primitives(adapted, params, adapter, x).count("scan") == 1


def test_scanned_bases_cost_no_memory():
    """The compiled gradient's scratch memory stays below one copy of the stacked base (64 layers, 4 MB)."""
    layers, width = 64, 128
    params = {"w": jnp.zeros((layers, width, width)), "b": jnp.zeros((layers, width))}
    x = jnp.zeros((2, width))
    plan = lj.plan(deep, params, x, config=config(rank=2))
    adapter = random_adapter(plan, np.float32)

    def scratch(fn, *args):
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

    stack = params["w"].nbytes
    factors = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    adapted = lj.apply(deep, plan)
    assert scratch(adapted, params, adapter, x) < 0.1 * stack
    assert scratch(jax.grad(adapted, argnums=1), params, adapter, x) < 4 * factors < 0.5 * stack
    # A gradient of the base has the stack's size, so the measure can see one.
    assert scratch(jax.grad(lambda p, a, x: adapted(p, a, x) + jax.tree.leaves(p)[1].sum()), params, adapter, x) >= 0
    merged = jax.grad(lambda a, p, x: deep(lj.merge(p, a), x))
    assert scratch(merged, adapter, params, x) > stack
