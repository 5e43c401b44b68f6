"""Layers that stand several times in a deeper model: shared weights, separate adapters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.core.harness import normal, random_adapter

X = jnp.asarray(normal(4, 6))
RANGES = [[0, 2], [1, 3]]
ORDER = [0, 1, 1, 2]


def forward(layers, x):
    for layer in layers:
        x = x + jnp.tanh(x @ layer["q"]["kernel"])
    return x


LAYERS = [{"q": {"kernel": jnp.asarray(normal(6, 6, seed=n))}} for n in range(3)]


def numbered(p, x):
    return forward([p["model"]["layers"][str(n)] for n in range(len(p["model"]["layers"]))], x)


def named(p, x):
    return forward([p["layers_" + str(n)] for n in range(len(p) - 1)], x)


def stacked(p, x):
    return jax.lax.scan(lambda h, w: (forward([w], h), None), x, p["layers"])[0]


FORMS = {
    "numbers": (numbered, {"model": {"layers": {str(n): w for n, w in enumerate(LAYERS)}}}, "model.layers"),
    "names": (named, {"norm": jnp.ones(3), **{f"layers_{n}": w for n, w in enumerate(LAYERS)}}, "layers"),
    "stack": (stacked, {"layers": jax.tree.map(lambda *w: jnp.stack(w), *LAYERS)}, "layers"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_layer_has_an_adapter_of_its_own(name):
    fn, params, path = FORMS[name]
    deeper = lj.replicate_layers(params, path, RANGES)
    want = forward([LAYERS[i] for i in ORDER], X)
    np.testing.assert_allclose(fn(deeper, X), want, rtol=1e-6)
    assert not np.allclose(fn(params, X), want, rtol=1e-2)
    plan = lj.plan(fn, deeper, X, config=lj.LoRAConfig(rank=2, target_modules=["q"]))
    adapter = random_adapter(plan, np.float32)
    got = lj.apply(fn, plan)(deeper, adapter, X)
    changes = [site.scale * jnp.matmul(*adapter.factors(site)) for site in plan.sites]
    if name == "stack":
        changes = list(changes[0])
    else:
        assert len(plan.sites) == 4
    merged = [{"q": {"kernel": LAYERS[i]["q"]["kernel"] + d}} for i, d in zip(ORDER, changes, strict=True)]
    np.testing.assert_allclose(got, forward(merged, X), rtol=2e-5, atol=2e-5)
    one = [{"q": {"kernel": LAYERS[i]["q"]["kernel"] + changes[ORDER[i]]}} for i in ORDER]
    assert not np.allclose(got, forward(one, X), rtol=1e-2)  # adapters shared as the weights are
    if name != "stack":
        with pytest.raises(ValueError, match="are one shared array; merging would make them differ"):
            lj.merge(deeper, adapter)


class Deep(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        for n in range(self.depth):
            x = x + jnp.tanh(nn.Dense(6, name=f"layers_{n}")(x))
        return x


def test_in_linen():
    params = Deep(3).init(jax.random.key(0), X)["params"]
    deeper = lj.replicate_layers(params, "layers", RANGES)
    assert deeper["layers_2"]["kernel"] is params["layers_1"]["kernel"]
    config = lj.LoRAConfig(rank=2, layer_replication=RANGES)
    adapted, adapter = lj.linen.adapt(Deep(4), deeper, config, X, key=jax.random.key(1))
    assert len(adapter.sites) == 4
    assert lj.LoRAConfig.from_dict(config.to_dict()) == config and hash(config) == hash(config.replace())
    assert config.to_peft()["layer_replication"] == RANGES


def test_mistakes_are_told():
    params = FORMS["numbers"][1]
    for path, ranges, message in (
        ("model.layer", RANGES, "`model.layer`: there is no `layer`, only layers"),
        ("models.layers", RANGES, "there is no `models`, only model"),
        ("model.layers", [[0, 4]], r"\[0, 4\] is no range \[start, end\) of the 3 layers"),
        ("model.layers", [[2, 1]], "is no range"),
        ("model.layers", [], "`ranges` is empty"),
        ("model", RANGES, r"`model` holds neither numbered layers nor arrays stacked along axis 0 \(lengths \[6\]\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lj.replicate_layers(params, path, ranges)
    for wrong in ([[0]], [1, 2], "12", [[2, 1]], 3):
        with pytest.raises(ValueError, match="is no list of ranges"):
            lj.LoRAConfig(layer_replication=wrong)
