"""Two parameters that meet in one product: one of them is data, and the other must still be adapted."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.core.harness import check, normal

TOKENS = np.array([[0, 3, 1, 4], [2, 2, 4, 0]])


def names(plan):
    return {site.name for site in plan.sites}


def test_looked_up_rows_enter_a_convolution():
    def fn(params, tokens):
        rows = params["embed"][tokens]
        return lax.conv_general_dilated(rows, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    plan = check(fn, {"embed": normal(5, 6), "conv": normal(3, 6, 4)}, TOKENS)
    assert {site.name: site.op for site in plan.sites} == {"embed": "embedding", "conv": "conv"}


def test_looked_up_rows_enter_grouped_experts():
    def fn(params, tokens, sizes):
        return lax.ragged_dot(params["embed"][tokens.reshape(-1)], params["experts"], sizes)

    plan = check(fn, {"embed": normal(5, 6), "experts": normal(2, 6, 4)}, TOKENS, np.array([3, 5], np.int32))
    assert {site.name: site.op for site in plan.sites} == {"embed": "embedding", "experts": "experts"}


def test_looked_up_rows_enter_gathered_experts():
    def fn(params, tokens, choice):
        return jnp.einsum("bd,bdf->bf", params["embed"][tokens[0]], params["experts"][choice])

    plan = check(fn, {"embed": normal(5, 6), "experts": normal(3, 6, 4)}, TOKENS, np.array([2, 0, 1, 2]))
    assert names(plan) == {"embed", "experts"}


def test_scaled_rows_split_into_heads():
    def fn(params, tokens):
        rows = (params["embed"] * 2.0)[tokens].reshape(*tokens.shape, 2, 3)
        return jnp.einsum("btnh,nhd->btd", rows * rows.mean(), params["out"])

    assert names(check(fn, {"embed": normal(5, 6), "out": normal(2, 3, 4)}, TOKENS)) == {"embed", "out"}


def test_learnt_queries_are_data():
    """A latent array that a projection reads: the projection is the weight, on whichever side it stands."""

    def fn(params, x):
        q = params["latents"] @ params["query"]
        k = jnp.einsum("dnh,d->nh", params["key"], params["seed"])
        return jnp.einsum("qd,td->qt", q, x) + k.sum()

    params = {"latents": normal(3, 6), "query": normal(6, 4), "key": normal(6, 2, 3), "seed": normal(6)}
    # `q` is of no input but the parameters, so the data flow takes it for a weight; the plan knows better.
    plan = check(fn, params, normal(5, 4), forms_weight=True)
    assert names(plan) == {"query", "key"}
    notes = {row.name: row.note for row in plan.rows}
    assert notes["latents"] == "never contracted (used by dot_general)"
