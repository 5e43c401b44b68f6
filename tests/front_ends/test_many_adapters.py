"""`apply_many` of the front ends: dropout and caches of linen, state of nnx, each part as if alone."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax import reference
from tests.core.harness import config, normal, random_adapter


class Decoder(nn.Module):
    """One step of cached attention and a layer with dropout of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        attend = nn.MultiHeadDotProductAttention(2, qkv_features=4, decode=True, name="attend")
        x = x + attend(x, x, deterministic=True)
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3, name="out")(x))


def worst(got, want):
    want = np.asarray(want, np.float64)
    return reference.excess(got, want, reference.tolerance("float32", 256) * np.abs(want).max())


def test_linen_decodes_with_a_cache():
    x = normal(4, 1, 6)
    model = Decoder()
    variables = model.init(jax.random.key(0), np.zeros((4, 5, 6), np.float32))
    params, cache = variables["params"], variables["cache"]
    adapted, _ = lj.linen.adapt(
        model, params, config(), x, key=jax.random.key(1), variables={"cache": cache}, mutable=["cache"]
    )
    adapters = {name: random_adapter(adapted.plan, np.float32, seed) for seed, name in enumerate("ab")}
    bank = lj.AdapterBank.create(adapted.plan.sites, 3)
    for name, adapter in adapters.items():
        bank = bank.add(name, adapter)
    names = ["b", "a", "__base__", "b"]

    @jax.jit
    def step(cache, stack, ids, x, key):
        return adapted.apply_many(
            {"params": params, "lora": stack, "cache": cache}, ids, x, train=True, rngs={"dropout": key},
            mutable=["cache"], collection_axes={"cache": 0},
        )  # fmt: skip

    keys, xs = jax.random.split(jax.random.key(2), 2), (x, normal(4, 1, 6, seed=1))
    now, got = cache, []
    for own_key, part in zip(keys, xs, strict=True):
        y, updated = step(now, bank.stack, bank.ids(names), part, own_key)
        now = updated["cache"]
        got.append(y)
    assert jax.tree.map(jnp.shape, now) == jax.tree.map(jnp.shape, cache) and step._cache_size() == 1

    @jax.jit
    def alone(params, cache, x, key):
        return model.apply({"params": params, "cache": cache}, x, True, rngs={"dropout": key}, mutable=["cache"])

    for i, name in enumerate(names[:3]):
        merged = params if name == "__base__" else lj.merge(params, adapters[name])
        own = {"cache": jax.tree.map(lambda leaf, i=i: leaf[i : i + 1] if leaf.ndim else leaf, cache)}
        for n, (own_key, part) in enumerate(zip(keys, xs, strict=True)):
            y, own = alone(merged, own["cache"], part[i : i + 1], own_key)
            assert worst(got[n][i : i + 1], y) <= 1 < worst(got[n][i - 1 : i or None], y)
    with pytest.raises(ValueError, match=r"`collection_axes` names \['batch_stats'\]"):
        adapted.apply_many(
            {"params": params, "lora": bank.stack}, bank.ids(names), x, collection_axes={"batch_stats": 0}
        )


def test_nnx():
    base = nnx.Sequential(
        nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.BatchNorm(5, rngs=nnx.Rngs(1)), nnx.Linear(5, 3, rngs=nnx.Rngs(2))
    )
    x = normal(4, 6)
    model = lj.nnx.adapt(base, config(), x, rngs=nnx.Rngs(3))
    model.eval()
    plan = lj.nnx.plan_of(model)
    adapters = {name: random_adapter(plan, np.float32, seed) for seed, name in enumerate("ab")}
    bank = lj.AdapterBank.create(plan.sites, 2).add("a", adapters["a"]).add("b", adapters["b"])
    got = nnx.jit(lj.nnx.apply_many)(model, bank.stack, bank.ids(["b", "a", "a", "__base__"]), x)
    for i, name in enumerate("ba"):
        lj.nnx.set_adapter(model, adapters[name])
        alone = lj.nnx.merge(model)(x[i : i + 1])
        assert worst(got[i : i + 1], alone) <= 1 < worst(got[3:], alone)
    assert worst(got[3:], base(x[3:])) <= 1
    model.train()
    with pytest.raises(ValueError, match="differs from part to part: batch statistics"):
        lj.nnx.apply_many(model, bank.stack, bank.ids(["b", "a"]), x)
