"""LoRA+ against PEFT's own optimizer, and against two optimizers of different rates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.optimizers import lora_plus
from tests.core.harness import config, normal, random_adapter

RATIO, RATE = 7.0, 0.01


def fn(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


PARAMS = {"up": {"kernel": normal(6, 8)}, "down": {"kernel": normal(8, 4)}}
X = normal(5, 6)


def stepped(tx, plan, adapter, steps=3):
    def loss(a):
        return (lj.apply(fn, plan)(PARAMS, a, X) ** 2).mean()

    @jax.jit
    def step(a, state):
        updates, state = tx.update(jax.grad(loss)(a), state, a)
        return optax.apply_updates(a, updates), state

    state = tx.init(adapter)
    for _ in range(steps):
        adapter, state = step(adapter, state)
    return adapter


@pytest.mark.parametrize("make", [optax.sgd, lambda rate: optax.adamw(rate, weight_decay=0.1)])
def test_b_has_a_rate_of_its_own(make):
    """With a schedule and weight decay, as two groups of `optax.multi_transform` have it; the magnitude goes with B."""
    plan = lj.plan(fn, PARAMS, X, config=config(use_dora=True))
    adapter = random_adapter(plan, np.float32)
    rate = optax.linear_schedule(RATE, 2 * RATE, 3)
    got = stepped(optax.chain(make(rate), lora_plus(RATIO)), plan, adapter)
    groups = {"slow": make(rate), "fast": make(lambda n: RATIO * rate(n))}

    def label(path, _):
        return "slow" if any(getattr(key, "key", "") == "lora_A" for key in path) else "fast"

    labels = jax.tree_util.tree_map_with_path(label, adapter)
    want = stepped(optax.multi_transform(groups, labels), plan, adapter)
    plain = stepped(make(rate), plan, adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    for site in plan.sites:
        (_, b), (_, b_plain) = got.factors(site), plain.factors(site)
        assert not np.allclose(b, b_plain, rtol=1e-3, atol=1e-4)


def test_in_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return self.up(x)

    model = lj.nnx.adapt(Net(nnx.Rngs(0)), lj.LoRAConfig(rank=2, init="random"), X, rngs=nnx.Rngs(1))
    before = jax.tree.map(jnp.copy, lj.nnx.adapter_of(model))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(RATE), lora_plus(RATIO)), wrt=nnx.LoRAParam)
    grads = nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    site = before.sites[0]
    slopes = [nnx.to_pure_dict(grads)["lora"]["up"][name]["kernel"] for name in ("lora_A", "lora_B")]
    for was, now, slope, times in zip(
        before.factors(site), lj.nnx.adapter_of(model).factors(site), slopes, (1, RATIO), strict=True
    ):
        np.testing.assert_allclose(now, was - times * RATE * slope, rtol=1e-5, atol=1e-6)


def test_as_pefts_optimizer_groups_them():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model = torch.nn.ModuleDict({"up": torch.nn.Linear(6, 8), "head": torch.nn.Linear(8, 4)})
    settings = peft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"], use_dora=True, bias="all")
    theirs = peft.get_peft_model(model, settings)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO)
    rates = {id(p): group["lr"] / RATE for group in optimizer.param_groups for p in group["params"]}
    factor = {name.replace(".default", ""): rates[id(p)] for name, p in theirs.named_parameters() if p.requires_grad}

    tree = {
        "up": {
            "lora_A": {"kernel": jnp.ones((6, 2))},
            "lora_B": {"kernel": jnp.ones((2, 8))},
            "lora_magnitude_vector": {"kernel": jnp.ones(8)},
            "bias": jnp.ones(8),
        },
        "head": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)},
    }
    tx = lora_plus(RATIO)
    got, _ = tx.update(tree, tx.init(tree))
    ours = {"/".join(key.key for key in path): float(x.mean()) for path, x in jax.tree_util.tree_leaves_with_path(got)}
    prefix = "base_model.model."
    assert ours == pytest.approx({
        "up/lora_A/kernel": factor[prefix + "up.lora_A.weight"],
        "up/lora_B/kernel": factor[prefix + "up.lora_B.weight"],
        "up/lora_magnitude_vector/kernel": factor[prefix + "up.lora_magnitude_vector.weight"],
        "up/bias": factor[prefix + "up.base_layer.bias"],
        "head/kernel": factor[prefix + "head.modules_to_save.weight"],
        "head/bias": factor[prefix + "head.modules_to_save.bias"],
    })  # fmt: skip


def test_mistakes_are_told():
    for ratio in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`ratio=.*` must be a positive number"):
            lora_plus(ratio)
    with pytest.raises(ValueError, match="found no `lora_B`.*initialise the optimizer with the adapter"):
        lora_plus().init(PARAMS)
