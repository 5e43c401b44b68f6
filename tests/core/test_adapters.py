"""The adapter is a plain pytree of factors that knows what it adapts."""

from __future__ import annotations

import copy
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.sites import Site
from tests.core.harness import cast, config, normal

PARAMS = {"layers_0": {"q_proj": {"kernel": normal(6, 8)}}, "stack": normal(2, 8, 4), "head": {"kernel": normal(4, 3)}}
X = normal(5, 6)


def fn(p, x):
    h = jnp.tanh(x @ p["layers_0"]["q_proj"]["kernel"])
    return (h @ p["stack"][0] + h @ p["stack"][1]) @ p["head"]["kernel"]


def make(**changes):
    params = cast(PARAMS, np.float32)
    plan = lj.plan(fn, params, X, config=config(modules_to_save=["head"], **changes))
    return params, plan, plan.init(jax.random.key(0), params)


def test_layout_of_the_tree():
    params, plan, adapter = make()
    shapes = {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(adapter)}
    assert shapes == {
        "layers_0/q_proj/lora_A/kernel": (6, 3),
        "layers_0/q_proj/lora_B/kernel": (3, 8),
        "lora_A/stack": (2, 8, 3),
        "lora_B/stack": (2, 3, 4),
        "head/kernel": (4, 3),
    }
    assert adapter["layers_0"]["q_proj"]["lora_A"]["kernel"].shape == (6, 3)
    assert set(adapter) == {"layers_0", "lora_A", "lora_B", "head"} and len(adapter) == 4
    assert adapter.count() == plan.count() == sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert repr(adapter) == f"Adapter(3 sites, {plan.count():,} parameters)"
    with pytest.raises(KeyError, match="the adapter has no leaf `layers_0/v_proj/kernel`"):
        adapter.leaf(("layers_0", "v_proj", "kernel"))


def test_saved_modules_start_at_the_base_and_are_copies():
    params, plan, adapter = make()
    np.testing.assert_array_equal(adapter["head"]["kernel"], params["head"]["kernel"])
    assert adapter["head"]["kernel"] is not params["head"]["kernel"]
    trained = jax.tree.map(lambda leaf: leaf + 1, adapter)
    got = lj.apply(fn, plan)(params, trained, X)
    np.testing.assert_allclose(got, fn(lj.merge(params, trained), X), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"trains copies of head.kernel: pass the base parameters"):
        plan.init(jax.random.key(0))


TRIPS = {
    "tree.map": lambda a: jax.tree.map(lambda leaf: leaf, a),
    "flatten": lambda a: jax.tree.unflatten(jax.tree.structure(a), jax.tree.leaves(a)),
    "jit": lambda a: jax.jit(lambda a: a)(a),
    "grad": lambda a: jax.grad(lambda a: sum((leaf**2).sum() / 2 for leaf in jax.tree.leaves(a)))(a),
    "vmap": lambda a: jax.tree.map(lambda v: v[0], jax.vmap(lambda a: a)(jax.tree.map(lambda v: v[None], a))),
    "pickle": lambda a: pickle.loads(pickle.dumps(a)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "flax bytes": lambda a: flax.serialization.from_bytes(
        jax.tree.map(jnp.zeros_like, a), flax.serialization.to_bytes(a)
    ),
    "numpy": lambda a: jax.tree.map(np.asarray, a),
    "plain dict": lambda a: lj.Adapter.from_leaves(
        {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(a.to_dict())}, a.sites
    ),
    "bool leaves": lambda a: jax.tree.map(lambda keep, v: v if keep else 0, jax.tree.map(lambda _: True, a), a),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIPS)
def test_round_trip(name):
    import lora_jax.linen  # noqa: F401  registers the adapter with flax.serialization

    params, plan, adapter = make()
    back = TRIPS[name](adapter)
    assert isinstance(back, lj.Adapter) and back.sites == adapter.sites
    assert jax.tree.structure(back) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)
    merged, want = lj.merge(params, back), lj.merge(params, adapter)
    jax.tree.map(np.testing.assert_array_equal, merged, want)


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    "masked": optax.masked(optax.adam(1e-2), lambda a: jax.tree.map(lambda leaf: leaf.ndim == 2, a)),
    "by label": optax.multi_transform(
        {"a": optax.sgd(0.1), "rest": optax.adam(1e-2)},
        lambda a: jax.tree_util.tree_map_with_path(lambda path, _: "a" if "lora_A" in str(path) else "rest", a),
    ),
    "every second": optax.MultiSteps(optax.adam(1e-2), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    params, plan, adapter = make()
    optimizer = OPTIMIZERS[name]
    state = optimizer.init(adapter)

    @jax.jit
    def step(adapter, state):
        gradient = jax.grad(lambda a: (lj.apply(fn, plan)(params, a, X) ** 2).mean())(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    trained = adapter
    for _ in range(2):
        trained, state = step(trained, state)
    assert isinstance(trained, lj.Adapter) and trained.sites == adapter.sites
    changed = [np.any(y != w) for y, w in zip(jax.tree.leaves(trained), jax.tree.leaves(adapter), strict=True)]
    assert all(changed)


def test_init_depends_on_key_and_name_only():
    params, plan, adapter = make()
    again = plan.init(jax.random.key(0), params)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    other = plan.init(jax.random.key(1), params)
    assert np.all(other["lora_A"]["stack"] != adapter["lora_A"]["stack"])
    alone = lj.plan(fn, params, X, config=config(target_modules=["stack"])).init(jax.random.key(0))
    np.testing.assert_array_equal(alone["lora_A"]["stack"], adapter["lora_A"]["stack"])
    assert np.all(adapter["lora_A"]["stack"][0] != adapter["lora_A"]["stack"][1])


# Standard deviation of A from (fan_in, rank).
SPREADS = {
    "kaiming": lambda i, r: (3 * i) ** -0.5,
    "xavier": lambda i, r: (2 / (i + r)) ** 0.5,
    "gaussian": lambda i, r: 1 / r,
}


@pytest.mark.parametrize("init", SPREADS)
def test_initial_distribution(init):
    scale = SPREADS[init](500, 16)
    w, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((500, 40), (2, 500)))
    plan = lj.plan(lambda p, x: x @ p["w"], {"w": w}, x, config=config(init=init, rank=16))
    a, b = plan.init(jax.random.key(0)).factors(plan.sites[0])
    assert a.dtype == b.dtype == jnp.float32 and not np.any(b)
    # 8000 draws: five standard deviations of the mean and of the standard deviation.
    assert abs(a.mean()) < 5 * scale / 8000**0.5
    assert abs(a.std() / scale - 1) < 5 / (2 * 8000) ** 0.5
    if init == "kaiming":
        assert np.max(abs(a)) <= 500**-0.5


def conv(p, x):
    return lax.conv(x, p["w"], (1, 1), "SAME")


KINDS = {
    "linear": (lambda p, x: x @ p["w"], (500, 40), (2, 500), 500),
    "conv": (conv, (40, 60, 3, 3), (1, 60, 4, 4), 540),  # PEFT counts the window too
}


@pytest.mark.parametrize("kind", KINDS)
def test_random_factors_are_uniform(kind):
    """`init="random"` is PEFT's `False`: A as by default, and B within the root of the rank."""
    fn, shape, x, fan_in = KINDS[kind]
    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, x))
    plan = lj.plan(fn, {"w": w}, x, config=config(init="random", rank=16))
    a, b = plan.init(jax.random.key(0)).factors(plan.sites[0])
    for values, bound in ((a, fan_in**-0.5), (b, 0.25)):
        assert 0.98 * bound < np.max(abs(values)) <= bound
        assert abs(values.std() / bound * 3**0.5 - 1) < 5 / (2 * values.size) ** 0.5


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values_of_embeddings(init):
    """As in PEFT: A is zero and B is N(0, 1), so that rows seen first train first."""
    plan = lj.plan(lambda p, i: p["e"][i], {"e": normal(70, 50)}, np.array([1, 2]), config=config(init=init))
    a, b = plan.init(jax.random.key(0)).factors(plan.sites[0])
    assert (a.shape, b.shape) == ((70, 3), (3, 50)) and not np.any(a)
    assert abs(b.mean()) < 5 / 150**0.5 and abs(b.std() - 1) < 5 / 300**0.5 and np.all(b)


def test_an_odd_rank_has_no_orthogonal_start():
    params = cast(PARAMS, np.float32)
    with pytest.raises(ValueError, match="needs an even rank, got 3 for `head.kernel`; use 4"):
        lj.plan(fn, params, X, config=config(init="orthogonal")).init(jax.random.key(0))


def test_sites_as_json():
    import json

    _, plan, _ = make()
    for site in plan.sites:
        assert Site.from_dict(json.loads(json.dumps(site.to_dict()))) == site


def test_summary_and_table():
    _, plan, _ = make()
    text = str(plan)
    total = plan.count_all() + plan.count()  # the copy of the saved head beside the original, as in PEFT
    assert text.endswith(
        f"trainable params: {plan.count()} || all params: {total} || trainable%: {100 * plan.count() / total:.4f}"
    )
    assert [line.split()[0] for line in text.splitlines()[2:-1]] == ["head.kernel", "layers_0.q_proj.kernel", "stack"]
    assert "lead in out" in text and "2x8x3" in text and "trained in full" in text
