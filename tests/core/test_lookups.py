"""Weights read by index: embedding tables, tied heads, stacks chosen by a static, dynamic or array index."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import lora_jax as lj
from tests.core.harness import check, config, normal, random_adapter

IDS = np.array([[3, 0, 6], [6, 6, 1]])
TABLE = {"embedding": normal(7, 5)}


def table(params: dict) -> jax.Array:
    return params["embedding"]


LOOKUPS = {
    "indexing": lambda w, ids: w[ids],
    "take": lambda w, ids: jnp.take(w, ids, axis=0),
    "take, clipped": lambda w, ids: jnp.take(w, ids * 3, axis=0, mode="clip"),
    "take from the other axis": lambda w, ids: jnp.take(w.T, ids, axis=1),
    "scaled as in Gemma": lambda w, ids: w[ids] * jnp.sqrt(5.0).astype(w.dtype),
    "one row": lambda w, ids: w[ids[0, 0]],
    "flat": lambda w, ids: w[ids.reshape(-1)],
    "vmap": lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i]))(ids),
    "under jit": lambda w, ids: jax.jit(lambda w, ids: w[ids])(w, ids),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_embedding(name):
    plan = check(lambda params, ids: LOOKUPS[name](table(params), ids), TABLE, IDS)
    assert (plan.sites[0].op, plan.sites[0].roles) == ("embedding", "io")


HEADS = {
    "x @ table.T": lambda w, x: x @ w.T,
    "einsum": lambda w, x: jnp.einsum("btd,vd->btv", x, w),
    "dot_general": lambda w, x: lax.dot_general(x, w, (((2,), (1,)), ((), ()))),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("lookup_first", [True, False])
def test_tied_head(name, lookup_first):
    """One table, looked up and contracted: A stays on the vocabulary's side in whichever order the uses come."""

    def fn(params, ids, x):
        w = table(params)
        if lookup_first:
            return HEADS[name](w, jnp.tanh(w[ids]))
        return HEADS[name](w, x), w[ids]

    plan = check(fn, TABLE, IDS, normal(2, 3, 5))
    assert (plan.sites[0].op, plan.sites[0].a_shape, plan.sites[0].b_shape) == ("embedding", (7, 3), (3, 5))


@pytest.mark.parametrize("fill", [None, 5.0])
def test_out_of_bounds(fill):
    """What stands for a row that is not there is the model's: NaN or the given value, without a delta."""
    far = np.array([1, 70])

    def fn(params, ids):
        return jnp.take(table(params), ids, axis=0, mode="fill", fill_value=fill)

    if fill is not None:
        check(fn, TABLE, far)
    plan = lj.plan(fn, TABLE, far, config=config())
    adapted = lj.apply(fn, plan)(TABLE, random_adapter(plan, np.float32), far)
    np.testing.assert_array_equal(adapted[1], np.full(5, np.nan if fill is None else fill, np.float32))
    assert np.all(np.isfinite(adapted[0]))


def test_one_hot_lookup_is_a_product():
    def fn(params, ids):
        return jax.nn.one_hot(ids, 7, dtype=table(params).dtype) @ table(params)

    assert check(fn, TABLE, IDS).sites[0].roles == "io"


def test_linen_embed_attend():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, 5, name="embed")
            return embed.attend(nn.Dense(5, name="proj")(embed(ids)))

    params = {"embed": {"embedding": normal(7, 5)}, "proj": {"kernel": normal(5, 5), "bias": normal(5)}}
    plan = check(lambda p, ids: Tied().apply({"params": p}, ids), params, IDS)
    assert [(s.name, s.op) for s in plan.sites] == [("embed.embedding", "embedding"), ("proj.kernel", "linear")]


def test_nnx_embed_attend():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 5, dtype=np.float64, rngs=rngs)
            self.proj = nnx.Linear(5, 5, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(self.proj(self.embed(ids)))

    graph, params = nnx.split(Tied(nnx.Rngs(0)), nnx.Param)
    plan = check(lambda p, ids: nnx.merge(graph, p)(ids), params, IDS)
    assert [(s.name, s.op) for s in plan.sites] == [("embed.embedding", "embedding"), ("proj.kernel", "linear")]


def pair(x: jax.Array) -> jax.Array:
    return jnp.stack([x, -x])


def grid(w: jax.Array) -> jax.Array:
    """The stack of four with two leading axes."""
    return w.reshape(2, 2, 6, 6)


STACK = {"w": normal(4, 6, 6)}
STACK_USES = {
    "dynamic index": lambda w, i, x: jnp.tanh(x @ w[i[0]]) @ w[i[1]],
    "dynamic_index_in_dim": lambda w, i, x: x @ lax.dynamic_index_in_dim(w, i[0], keepdims=False),
    "dynamic_slice": lambda w, i, x: jnp.einsum("lbd,ldf->blf", pair(x), lax.dynamic_slice_in_dim(w, i[0], 2)),
    "array index": lambda w, i, x: jnp.einsum("bd,kdf->bkf", x, w[i]),
    "matrix per row": lambda w, i, x: jnp.einsum("kd,kdf->kf", x[:2], w[i]),
    "two array indices": lambda w, i, x: jnp.einsum("kd,kdf->kf", x[:2], grid(w)[i // 2, i % 2]),
    "array index, then index": lambda w, i, x: jnp.tanh(x @ w[i][0]) @ w[i][1],
    "negative index": lambda w, i, x: jnp.tanh(x @ w[-1]) @ w[0],
    "nested array index": lambda w, i, x: jnp.einsum("bd,ijdf->bijf", x, w[jnp.stack([i, i[::-1]])]),
    "two vmapped indices": lambda w, i, x: jax.vmap(lambda j, row: row @ grid(w)[j // 2, j % 2])(i, x[:2]),
    "vmapped index": lambda w, i, x: jax.vmap(lambda j, row: row @ w[j])(i, x[:2]),
}


@pytest.mark.parametrize("name", STACK_USES)
def test_stack(name):
    """The chosen matrices have their own A and B, as they have their own W."""
    plan = check(lambda params, i, x: STACK_USES[name](params["w"], i, x), STACK, np.array([2, 1]), normal(3, 6))
    assert (plan.sites[0].roles, plan.sites[0].a_shape, plan.sites[0].b_shape) == ("lio", (4, 6, 3), (4, 3, 6))


def test_the_other_side_of_chosen_matrices():
    def fn(params, i, x):
        return jnp.einsum("kf,kdf->kd", jnp.tanh(jnp.einsum("kd,kdf->kf", x[:2], params["w"][i])), params["w"][i])

    assert check(fn, STACK, np.array([2, 1]), normal(3, 6)).sites[0].roles == "lio"


def test_chosen_matrices_that_are_also_formed():
    """Picking matrices by index is no lookup of a table: where they are used otherwise, the plan reports it."""

    def fn(params, i, x):
        chosen = params["w"][i]
        return jnp.einsum("kd,kdf->kf", x[:2], chosen), jnp.tanh(chosen)

    # The indices are data, so the data flow sees no weight of factors alone.
    plan = check(fn, STACK, np.array([2, 1]), normal(3, 6), materialised=["tanh"], forms_weight=False)
    assert plan.sites[0].roles == "lio"


def test_table_of_matrices():
    """Never contracted, only looked up: each row of the table is its heads, flattened."""
    plan = check(lambda params, ids: jnp.tanh(params["w"][ids]), {"w": normal(7, 2, 3)}, IDS)
    assert (plan.sites[0].op, plan.sites[0].roles) == ("embedding", "ioo")


def test_stack_with_one_lead_axis_and_a_table_axis():
    """Layer `i` of stacked tables, looked up."""

    def fn(params, i, ids):
        return params["w"][i[0]][ids] + params["w"][i[1], ids]

    plan = check(fn, {"w": normal(3, 7, 5)}, np.array([2, 1]), IDS)
    assert plan.sites[0].op == "embedding"
