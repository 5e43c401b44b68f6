"""QALoRA's A over groups of inputs: against PEFT's own forward pass, merged, and through a PEFT directory."""

from __future__ import annotations

import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.core.harness import normal

X = normal(5, 12)
GROUP = 4
SETTINGS = dict(rank=3, alpha=5, target_modules=["up"], use_qalora=True, qalora_group_size=GROUP, init="random")


def fn(params, x):
    return x @ params["up"]["kernel"]


PARAMS = {"up": {"kernel": jnp.asarray(normal(12, 7))}}


def scanned(p, x):
    return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, p["w"])[0]


def made():
    plan = lj.plan(fn, PARAMS, X, config=lj.LoRAConfig(**SETTINGS))
    return plan, plan.init(jax.random.key(0))


def test_uses():
    """A dense layer, heads and stacked layers, against the merged weight; gradients are sums over each group."""
    for use, w in (
        (lambda p, x: x @ p["w"], normal(12, 7)),
        (lambda p, x: jnp.einsum("bd,hdk->bhk", x, p["w"]), normal(3, 12, 4)),
        (scanned, normal(2, 12, 12)),
    ):
        plan = lj.plan(use, {"w": w}, X, config=lj.LoRAConfig(**{**SETTINGS, "target_modules": ["w"]}))
        (site,) = plan.sites
        adapter = plan.init(jax.random.key(1))
        assert (
            site.a_shape == (*site.sizes_of("l"), 3, 3) and adapter.leaf(site.leaf_path("lora_A")).shape == site.a_shape
        )
        merged = use(lj.merge({"w": jnp.asarray(w)}, adapter), X)
        got = lj.apply(use, plan)({"w": jnp.asarray(w)}, adapter, X)
        np.testing.assert_allclose(got, merged, rtol=2e-5, atol=2e-5)
        assert not np.allclose(got, use({"w": jnp.asarray(w)}, X), rtol=1e-2)
        grads = jax.grad(lambda a, use=use, plan=plan, w=w: lj.apply(use, plan)({"w": w}, a, X).sum())(adapter)
        assert grads.leaf(site.leaf_path("lora_A")).shape == site.a_shape and np.any(
            grads.leaf(site.leaf_path("lora_A"))
        )


def test_pefts_own_forward_pass(tmp_path: Path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from peft.tuners.lora.variants import QALoraLinearVariant

    from lora_torch import load_peft, plan_peft, read_peft, save_peft

    plan, adapter = made()
    directory = save_peft(adapter, tmp_path / "a", plan)
    config, tensors = read_peft(directory)
    assert (config["use_qalora"], config["qalora_group_size"]) == (True, GROUP)
    a, b = (torch.tensor(tensors[f"base_model.model.up.lora_{x}.weight"]) for x in "AB")
    assert a.shape == (3, 12 // GROUP)
    module = types.SimpleNamespace(
        lora_A={"default": types.SimpleNamespace(weight=a)}, lora_B={"default": types.SimpleNamespace(weight=b)},
        lora_dropout={"default": torch.nn.Identity()}, scaling={"default": 5 / 3}, in_features=12,
        qalora_group_size={"default": GROUP}, training=False,
    )  # fmt: skip
    base = torch.tensor(X @ np.asarray(PARAMS["up"]["kernel"]))
    want = QALoraLinearVariant.forward(module, "default", torch.tensor(X), base).numpy()
    got = np.asarray(lj.apply(fn, plan)(PARAMS, adapter, X))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    mean = base.numpy() + (want - base.numpy()) / (12 // GROUP)  # a mean without PEFT's factor
    assert not np.allclose(got, mean, rtol=1e-3, atol=1e-3)

    again = plan_peft(directory, fn, PARAMS, X)
    back = load_peft(directory, again)
    assert back.sites == adapter.sites
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(adapter), strict=True))
    plain = lj.plan(fn, PARAMS, X, config=lj.LoRAConfig(rank=3, alpha=5, target_modules=["up"]))
    with pytest.raises(ValueError, match="the file's lora_A stands for 4 inputs each, the plan's for 1"):
        load_peft(directory, plain)
    with pytest.raises(ValueError, match="vLLM does not read QALoRA"):
        save_peft(adapter, tmp_path / "v", plan, target="vllm")


def test_operations_on_adapters():
    """A rank keeps the groups; a sum and a bank have ordinary factors. All of them compute the same change."""
    plan, adapter = made()
    run = jax.jit(lambda adapter: lj.apply(fn, plan)(PARAMS, adapter, X))
    want = np.asarray(run(adapter))

    def same(got, value=want):
        return np.allclose(got, value, rtol=2e-5, atol=2e-5)

    assert not same(fn(PARAMS, X))
    grown, back = lj.resize(adapter, 5, key=jax.random.key(1)), lj.resize(lj.resize(adapter, 5), 3)
    assert same(run(grown)) and same(run(back))
    assert {site.group for site in (*grown.sites, *back.sites)} == {GROUP}
    dense = np.asarray(lj.merge(PARAMS, adapter)["up"]["kernel"] - PARAMS["up"]["kernel"], np.float64)
    u, s, vt = np.linalg.svd(dense)
    assert same(run(lj.resize(adapter, 2)), fn(PARAMS, X) + X @ (u[:, :2] * s[:2] @ vt[:2]))

    ordinary = lj.plan(fn, PARAMS, X, config=lj.LoRAConfig(**{**SETTINGS, "use_qalora": False})).init(jax.random.key(2))
    both = lj.combine([adapter, ordinary], [2.0, -1.0])
    assert same(run(both), fn(PARAMS, X) + 2 * (want - fn(PARAMS, X)) - (run(ordinary) - fn(PARAMS, X)))
    bank = lj.AdapterBank.create(plan.sites, 2).add("groups", adapter).add("plain", ordinary)
    got = lj.apply_many(fn, plan)(PARAMS, bank.stack, bank.ids(["groups", "plain", "__base__", "groups", "plain"]), X)
    assert same(got[::3], want[::3]) and same(got[1::3], run(ordinary)[1::3]) and same(got[2], fn(PARAMS, X)[2])
    assert same(run(bank.get("groups")))
    with pytest.raises(ValueError, match=r"`use_qalora` plans something else for `up\.kernel`: plan without"):
        lj.extract(plan, PARAMS, lj.merge(PARAMS, adapter), key=jax.random.key(0))


def test_what_has_no_groups():
    for changes, message in (
        (dict(qalora_group_size=5), "12 inputs are no groups of `qalora_group_size=5`"),
        (dict(use_dora=True), "`use_qalora` with `use_dora`"),
        (dict(qalora_group_size=0), "must be a positive whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            lj.plan(fn, PARAMS, X, config=lj.LoRAConfig(**{**SETTINGS, **changes}))
    table = {"up": {"embedding": normal(12, 8)}}
    with pytest.raises(ValueError, match=r"no linear layer of one input axis \(embedding\)"):
        lj.plan(lambda p, i: p["up"]["embedding"][i], table, np.array([1]), config=lj.LoRAConfig(**SETTINGS))
