"""Trained rows of a table, looked up, scaled, tied and merged: the table with these rows replaced."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import reference
from lora_jax.sites import TOKENS
from tests.core.harness import cast, normal

IDS = np.array([[3, 0, 6], [6, 2, 1]])
ROWS = (6, 1, 3)
TABLE = {"embed": {"embedding": normal(7, 5)}, "up": {"kernel": normal(5, 5)}}

USES = {
    "lookup": lambda p, ids: jnp.tanh(p["embed"]["embedding"][ids] @ p["up"]["kernel"]),
    "scaled": lambda p, ids: p["embed"]["embedding"][ids] * 3.0 @ p["up"]["kernel"],
    "clipped": lambda p, ids: jnp.take(p["embed"]["embedding"], 1 + ids, axis=0, mode="clip") @ p["up"]["kernel"],
    "tied": lambda p, ids: (p["embed"]["embedding"][ids] @ p["up"]["kernel"]) @ p["embed"]["embedding"].T,
}


def settings(**changes):
    return lj.LoRAConfig(**{"rank": 2, "target_modules": ["up"], "trainable_token_indices": ROWS, **changes})


@pytest.mark.parametrize("name", USES)
def test_rows_are_replaced(name):
    fn = USES[name]
    with jax.enable_x64(True):
        params = cast(TABLE, np.float64)
        plan = lj.plan(fn, params, IDS, config=settings(dtype="float64", dropout=0.3))
        assert not plan.materialised
        site = plan.sites[0]
        assert (site.tokens, site.tied) == (ROWS, name == "tied")
        adapter = plan.init(jax.random.key(0), params)
        path = site.leaf_path(TOKENS)
        np.testing.assert_array_equal(adapter.leaf(path), TABLE["embed"]["embedding"][list(ROWS)])
        rows = normal(3, 5, seed=4).astype(np.float64)
        leaves = {p: adapter.leaf(p) for s in plan.sites for p in s.leaves} | {path: jnp.asarray(rows)}
        adapter = lj.Adapter.from_leaves(leaves, plan.sites)

        table = TABLE["embed"]["embedding"].astype(np.float64)
        table[list(ROWS)] = rows

        def at(table):
            return fn({**params, "embed": {"embedding": table}}, IDS)

        apply = jax.jit(lj.apply(fn, plan))
        want = np.asarray(at(jnp.asarray(table)))
        bound = reference.tolerance(np.float64, 64) * np.abs(want).max()
        assert reference.excess(apply(params, adapter, IDS), want, bound) <= 1
        for lost in range(3):  # each row counts
            other = table.copy()
            other[ROWS[lost]] = TABLE["embed"]["embedding"][ROWS[lost]]
            assert reference.excess(at(jnp.asarray(other)), want, bound) > 1e3
        assert (
            reference.excess(apply(params, adapter, IDS, key=jax.random.key(1)), want, bound) <= 1
        )  # B = 0: none drops
        np.testing.assert_array_equal(lj.merge(params, adapter)["embed"]["embedding"], table)

        of_table = np.asarray(jax.grad(lambda t: (at(t) ** 3).sum())(jnp.asarray(table)))[list(ROWS)]
        grads = jax.grad(lambda a: (apply(params, a, IDS) ** 3).sum())(adapter)
        assert reference.excess(grads.leaf(path), of_table, 1e-12 * np.abs(of_table).max()) <= 1
    with pytest.raises(ValueError, match="cannot unmerge embed.embedding"):
        lj.unmerge(params, adapter)


def test_a_bfloat16_table():
    """Rows are kept in float32 and come out as their own bfloat16 values; the others as they were."""
    params = cast({"table": normal(7, 64), "up": normal(3, 3)}, "bfloat16")

    def fn(p, ids):
        return p["table"][ids], jnp.ones((1, 3), "bfloat16") @ p["up"]

    plan = lj.plan(fn, params, IDS, config=settings())
    adapter = plan.init(jax.random.key(0), params)
    rows = jnp.asarray(normal(3, 64, seed=4))
    leaves = {p: adapter.leaf(p) for s in plan.sites for p in s.leaves} | {("trainable_tokens", "table"): rows}
    got, _ = lj.apply(fn, plan)(params, lj.Adapter.from_leaves(leaves, plan.sites), np.arange(7))
    want = params["table"].at[jnp.asarray(ROWS)].set(rows.astype("bfloat16"))
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, params["table"])


def test_in_linen_with_several_tables():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            tokens, places = nn.Embed(7, 5, name="tokens"), nn.Embed(3, 5, name="places")
            x = nn.Dense(5, name="up")(tokens(ids) + places(jnp.arange(3)))
            return tokens.attend(x)

    model = Model()
    params = model.init(jax.random.key(0), IDS)["params"]
    config = settings(trainable_token_indices={"tokens": [5, 0], "places": [2]})
    adapted, adapter = lj.linen.adapt(model, params, config, IDS, key=jax.random.key(1))
    moved = jax.tree.map(lambda x: x + 1, adapter)
    want = model.apply({"params": lj.merge(params, moved)}, IDS)
    got = adapted.apply({"params": params, "lora": moved}, IDS)
    assert jnp.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert jnp.allclose(
        adapted.apply({"params": params, "lora": adapter}, IDS), model.apply({"params": params}, IDS), atol=1e-5
    )
    assert "embedding rows" in str(adapted.plan)
    with pytest.raises(ValueError, match=r"it could be any of `places`, `tokens`\. Write {'name': \[6, 1, 3\]}"):
        lj.linen.adapt(model, params, settings(), IDS, key=jax.random.key(1))


def test_what_cannot_be_trained():
    def plan(**changes):
        return lj.plan(USES["lookup"], TABLE, IDS, config=settings(**changes))

    for changes, message in (
        (dict(trainable_token_indices=[7]), r"`embed.embedding` \(7, 5\) has 7 rows .* asks for row 7"),
        (
            dict(trainable_token_indices={"up": [1]}),
            "one table that is looked up called `up`: the model has `embed`",
        ),
        (dict(target_modules=["up", "embed"]), "by `trainable_token_indices` and by `target_modules`"),
        (dict(modules_to_save=["embed"]), "by `trainable_token_indices` and by `target_modules`"),
        (dict(trainable_token_indices=[1, 1]), "must name one row or more, each once"),
        (dict(trainable_token_indices=[-1]), "whole numbers, 0 or more"),
        (dict(trainable_token_indices=[1.5]), "whole numbers, 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(**changes)
    for value in ("12", 3):
        with pytest.raises(TypeError, match="is no list of rows"):
            lj.LoRAConfig(trainable_token_indices=value)
    config = settings(trainable_token_indices={"embed": [3]})
    assert lj.LoRAConfig.from_dict(config.to_dict()) == config and hash(config) == hash(config.replace())
