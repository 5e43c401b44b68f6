"""Adapters that train together in one batch, each with its own loss and optimizer state, as if each trained alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import reference
from tests.core.harness import cast, config, normal, random_adapter

PARAMS = {"stack": {"kernel": normal(2, 6, 6)}}
# A norm over all parameters, moments, decay and a schedule: each would couple the slots if they were one tree.
TX = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(optax.linear_schedule(0.1, 0.02, 3), weight_decay=0.1))


def loss(params, batch):
    x, y = batch
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"]["kernel"])[0]
    return ((x - y) ** 2).mean()


def batches(step):
    return normal(4, 6, seed=step), normal(4, 6, seed=50 + step)


def test_trained_together_as_if_alone():
    with jax.enable_x64(True):
        params = cast(PARAMS, np.float64)
        data = [cast(batches(step), np.float64) for step in range(3)]
        plan = lj.plan(loss, params, data[0], config=config(dtype="float64"))
        adapters = {}
        for name, rank in (("one", 1), ("two", 2), ("idle", 3)):
            own = lj.plan(loss, params, data[0], config=config(rank=rank, alpha=rank + 1.0, dtype="float64"))
            adapters[name] = random_adapter(own, np.float64, rank)
        bank = lj.AdapterBank.create(plan.sites, 5, dtype="float64")
        for name, adapter in adapters.items():
            bank = bank.add(name, adapter)
        tx = lj.per_slot(TX, bank.stack)
        many = lj.apply_many(loss, plan)

        @jax.jit
        def step(stack, state, ids, batch):
            def total(factors):
                losses = many(params, stack.with_factors(factors), ids, batch)
                return losses.sum(), losses

            grads, losses = jax.grad(total, has_aux=True)(stack.factors)
            active = lj.active_slots(stack, ids)
            updates, state = tx.update(grads, state, stack.factors, active=active)
            return stack.with_factors(optax.apply_updates(stack.factors, updates)), state, losses

        # "two" rests in the second step; each adapter has a half of the batch.
        plan_of_steps = (["one", "two"], ["one", "__base__"], ["two", "one"])
        stack, state, seen = bank.stack, tx.init(bank.stack.factors), []
        for names, batch in zip(plan_of_steps, data, strict=True):
            stack, state, losses = step(stack, state, bank.ids(names), batch)
            seen += [(name, float(value)) for name, value in zip(names, losses, strict=True)]
        assert step._cache_size() == 1
        trained = bank.with_factors(stack.factors)

        for name in ("one", "two"):
            adapter, own = adapters[name], TX.init(adapters[name])
            run = jax.jit(jax.value_and_grad(lambda a, batch: lj.apply(loss, plan)(params, a, batch)))
            alone = []
            for names, (x, y) in zip(plan_of_steps, data, strict=True):
                if name in names:
                    part = slice(0, 2) if names[0] == name else slice(2, 4)
                    value, grads = run(adapter, (x[part], y[part]))
                    alone.append(float(value))
                    updates, own = TX.update(grads, own, adapter)
                    adapter = optax.apply_updates(adapter, updates)
            # optax computes schedules and corrections in float32, and not to the same bit inside and outside of `jit`.
            single = reference.tolerance(np.float32, 100)
            np.testing.assert_allclose([v for n, v in seen if n == name], alone, rtol=single)
            for got, want, start in zip(
                *map(jax.tree.leaves, (trained.get(name), adapter, adapters[name])), strict=True
            ):
                bound = single * np.abs(want).max()
                assert reference.excess(got, np.asarray(want), bound) <= 1
                assert reference.excess(start, np.asarray(want), bound) > 1
        for got, want in zip(*map(jax.tree.leaves, (trained.get("idle"), adapters["idle"])), strict=True):
            np.testing.assert_array_equal(got, want)
        # What pads a smaller rank stays zero: `get` cuts it off, and a larger rank would have trained.
        a = stack.leaf(("stack", "lora_A", "kernel"))[:, :, bank.slot("one")]
        assert not np.any(a[..., 1:]) and np.all(np.any(a[..., :1] != 0, 1))


def test_without_a_mask_every_slot_moves():
    """Decay and moments go on in slots that saw no data, which is why the mask exists."""
    params, data = cast(PARAMS, np.float32), cast(batches(0), np.float32)
    plan = lj.plan(loss, params, data, config=config())
    bank = lj.AdapterBank.create(plan.sites, 2).add("a", random_adapter(plan, np.float32))
    tx = lj.per_slot(optax.adamw(0.1, weight_decay=0.1), bank.stack)
    zeros = jax.tree.map(jnp.zeros_like, bank.stack.factors)
    state = tx.init(bank.stack.factors)
    update = jax.jit(tx.update)
    moved, _ = update(zeros, state, bank.stack.factors)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(moved))
    nobody = lj.active_slots(bank.stack, bank.ids(["__base__"]))
    still, same = jax.jit(tx.update)(zeros, state, bank.stack.factors, active=nobody)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(still))
    for one, other in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_new_adapter_in_an_old_slot():
    """It trains as if it had always been alone, and the others go on: after `fresh_slot`, and not without it."""
    params, data = cast(PARAMS, np.float32), cast(batches(0), np.float32)
    plan = lj.plan(loss, params, data, config=config())
    old, other, new = (random_adapter(plan, np.float32, seed) for seed in range(3))
    bank = lj.AdapterBank.create(plan.sites, 2).add("old", old).add("other", other)
    tx = lj.per_slot(TX, bank.stack)

    def factors_of(adapter):  # gradients that differ
        return lj.AdapterBank.create(plan.sites, 2).add("x", adapter).add("y", adapter).stack.factors

    update = jax.jit(tx.update)
    _, state = update(factors_of(old), tx.init(bank.stack.factors), bank.stack.factors)
    bank = bank.remove("old").add("new", new)
    fresh = lj.fresh_slot(tx, state, bank.stack, bank.slot("new"))
    (moved, _), (stale, _) = (update(factors_of(other), s, bank.stack.factors) for s in (fresh, state))
    alone, _ = TX.update(other, TX.init(new), new)
    slot = bank.slot("new")
    trees = (moved, stale, alone, bank.stack.slot_axes())
    for got, kept, want, axis in zip(*map(jax.tree.leaves, trees), strict=True):
        got, kept = (np.moveaxis(np.asarray(leaf), axis, 1) for leaf in (got, kept))  # (layers, slots, ...)
        bound = reference.tolerance(np.float32, 100) * np.abs(want).max()
        assert reference.excess(got[:, slot], np.asarray(want), bound) <= 1
        assert reference.excess(kept[:, slot], np.asarray(want), bound) > 1
        np.testing.assert_array_equal(got[:, 1 - slot], kept[:, 1 - slot])
    with pytest.raises(ValueError, match="there is no slot 2: the stack has slots 0 to 1"):
        lj.fresh_slot(tx, state, bank.stack, 2)
