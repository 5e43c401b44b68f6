"""How a bank's stack lies in memory: nothing of its size is moved for a product with all of its slots."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import _compat
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.many import Many, many_contract
from lora_jax.weights.lora import RANK
from tests.core.dataflow import walk
from tests.core.harness import config, normal

SLOTS, K, N = 24, 10, 14
PARAMS = {
    "table": {"embedding": normal(20, K)},
    "heads": {"kernel": normal(K, 2, 7)},
    "out": {"kernel": normal(2, 7, K)},
}
TOKENS = np.arange(3)[:, None]


def model(p, tokens):
    """A lookup, several axes of outputs, several of inputs, and the tied head."""
    x = p["table"]["embedding"][tokens]
    y = jnp.einsum("bsd,dnh->bsnh", x, p["heads"]["kernel"])
    x = x + jnp.einsum("bsnh,nhd->bsd", y, p["out"]["kernel"])
    return x @ p["table"]["embedding"].T


def moved(fn, *args, least):
    """Transposes of at least `least` elements, and products with operands as large that no reshape makes matrices."""
    jaxpr, _ = _compat.open_jaxpr(jax.make_jaxpr(fn)(*args))
    found = []
    for eqn, _ in walk(jaxpr, [frozenset()] * len(jaxpr.invars)):
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        if eqn.primitive.name == "transpose" and max(map(math.prod, shapes)) >= least:
            found.append(str(eqn))
        if eqn.primitive.name == "dot_general":
            summed, batch = eqn.params["dimension_numbers"]
            for shape, dims, also in zip(shapes[:2], summed, batch, strict=True):
                ends = (tuple(range(len(dims))), tuple(range(len(shape) - len(dims), len(shape))))
                if math.prod(shape) >= least and (also or dims not in ends):
                    found.append(str(eqn))
    return found


def gradients(fn):
    def both(factors, *args):
        y, back = jax.vjp(lambda factors: fn(factors, *args), factors)
        return y, *back(y)

    return both


def test_the_masked_way_multiplies_by_the_stack_as_it_lies():
    plan = lj.plan(model, PARAMS, TOKENS, config=config())
    bank = lj.AdapterBank.create(plan.sites, SLOTS)
    leaves = jax.tree.leaves(bank.stack.factors)
    assert len(leaves) == 6
    least = min(leaf.size for leaf in leaves)
    many = lj.apply_many(model, plan, selection="masked")

    def run(factors, tokens):
        return many(PARAMS, bank.stack.with_factors(factors), bank.ids(["__base__"] * 3), tokens)

    assert moved(run, bank.stack.factors, TOKENS, least=least) == []
    assert moved(gradients(run), bank.stack.factors, TOKENS, least=least) == []


@pytest.mark.parametrize("where, moves", [("before the rank", False), ("first", True)])
def test_the_place_of_the_slots_decides(where, moves):
    """In what is compiled, too: with the slots of A first it is written in another order at every call."""
    r = 4
    spec = Contraction(x=("t", "k"), w=("k", "n"), first=("k", RANK), second=(RANK, "n"), y=("t", "n"))
    axes = ("slot", "k", RANK) if where == "first" else ("k", "slot", RANK)
    a = normal(*(dict(k=K, slot=SLOTS, rank=r)[name] for name in axes))
    many = Many(axes, ("slot", RANK, "n"), SLOTS, "masked")

    def run(factors, x, w, ids):
        return jax.vmap(lambda x, i: many_contract(spec, many, x, w, *factors, jnp.ones(SLOTS), i, None))(x, ids)

    args = (a, normal(SLOTS, r, N)), normal(3, 1, K), normal(K, N), np.arange(3, dtype=np.int32)
    assert bool(moved(gradients(run), *args, least=a.size)) == moves
    text = jax.jit(run).lower(*args).compile().as_text()
    shapes = re.findall(r"\[([\d,]+)\]\S* (?:transpose|copy)\(", text)
    assert any(math.prod(map(int, shape.split(","))) >= a.size for shape in shapes) == moves
