"""The adapted function is a function like any other: transformed, nested, traced, called with anything."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lora_jax as lj
from lora_jax import reference
from tests.core.harness import cast, config, merged_params, normal, random_adapter

PARAMS = {"up": {"kernel": normal(6, 8)}, "down": {"kernel": normal(8, 4)}}
X = jnp.asarray(normal(5, 6))


def fn(p, x):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


@pytest.fixture(scope="module")
def setup():
    params = cast(PARAMS, np.float32)
    plan = lj.plan(fn, params, X, config=config())
    adapter = random_adapter(plan, np.float32)
    with jax.enable_x64(True):
        merged = merged_params(cast(PARAMS, np.float64), adapter)
        want = np.asarray(fn(merged, np.asarray(X, np.float64)))
    return params, plan, adapter, want


def agrees(got, want, base):
    """Within float32 of `want`, which the base's result is not."""
    want = np.asarray(want, np.float64)
    bound = reference.tolerance("float32", 32) * np.abs(want).max()
    assert reference.excess(got, want, bound) <= 1 < reference.excess(base, want, bound)


TRANSFORMS = {
    "eager": lambda call: call,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap over data": lambda call: lambda p, a, x: jax.vmap(call, in_axes=(None, None, 0))(p, a, x[:, None])[:, 0],
    "vmap over adapters": lambda call: lambda p, a, x: jax.vmap(call, in_axes=(None, 0, None))(
        p, jax.tree.map(lambda v: jnp.stack([v, 2 * v]), a), x)[0],
    "vmap over models": lambda call: lambda p, a, x: jax.vmap(call, in_axes=(0, 0, None))(
        *jax.tree.map(lambda v: jnp.stack([v, 2 * v]), (p, a)), x)[0],
    "map over data": lambda call: lambda p, a, x: lax.map(lambda row: call(p, a, row[None])[0], x),
    "donated jit": lambda call: jax.jit(lambda p, a, x: call(p, a, x), donate_argnums=()),
    "jit of vmap of checkpoint": lambda call: lambda p, a, x: jax.jit(
        jax.vmap(jax.checkpoint(call), in_axes=(None, None, 0)))(p, a, x[:, None])[:, 0],
    "lowered and compiled": lambda call: lambda p, a, x: jax.jit(call).lower(p, a, x).compile()(p, a, x),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformed(setup, name):
    params, plan, adapter, want = setup
    agrees(TRANSFORMS[name](lj.apply(fn, plan))(params, adapter, X), want, fn(params, X))


def test_inside_a_scan_over_steps(setup):
    """Training steps in one `lax.scan`, the adapter and the optimizer's state as its carry."""
    params, plan, adapter, _ = setup
    call, optimizer = lj.apply(fn, plan), optax.adamw(1e-2)
    target = jnp.ones((5, 4))

    def loss(adapter):
        return ((call(params, adapter, X) - target) ** 2).mean()

    def step(carry, _):
        adapter, state = carry
        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return (optax.apply_updates(adapter, updates), state), value

    start = (adapter, optimizer.init(adapter))
    (trained, state), losses = jax.jit(lambda c: lax.scan(step, c, None, length=60))(start)
    assert losses[-1] < 0.3 * losses[0]
    assert isinstance(trained, lj.Adapter) and trained.sites == plan.sites
    one_by_one, values = start, []
    for _ in range(3):
        one_by_one, value = jax.jit(step)(one_by_one, None)
        values.append(value)
    np.testing.assert_allclose(values, losses[:3], rtol=1e-5)
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert count == 2 * plan.count() + 1  # moments of the factors and a step counter: nothing of the base


def test_gradients_see_what_they_are_asked_for(setup):
    params, plan, adapter, _ = setup
    call = lj.apply(fn, plan)
    value, (of_params, of_adapter) = jax.value_and_grad(lambda p, a: call(p, a, X).sum(), argnums=(0, 1))(
        params, adapter
    )
    assert jax.tree.structure(of_params) == jax.tree.structure(params)
    assert jax.tree.structure(of_adapter) == jax.tree.structure(adapter)
    np.testing.assert_allclose(value, call(params, adapter, X).sum(), rtol=1e-6)
    as_dict = jax.grad(lambda a: call(params, a, X).sum())(adapter.to_dict())
    assert isinstance(as_dict, dict)
    jax.tree.map(np.testing.assert_array_equal, as_dict, of_adapter.to_dict())


def test_under_eval_shape(setup):
    params, plan, adapter, want = setup
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, adapter, X))
    out = jax.eval_shape(lj.apply(fn, plan), *abstract)
    assert (out.shape, out.dtype) == (want.shape, jnp.float32)


def test_planned_from_shapes_alone(setup):
    params, plan, _, _ = setup
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, X))
    again = lj.plan(fn, *abstract, config=config())
    assert (again.sites, again.rows, again.materialised) == (plan.sites, plan.rows, plan.materialised)
    made = jax.eval_shape(plan.init, jax.random.key(0))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(made))


def test_planning_under_jit(setup):
    """A plan is static data, so making one inside a trace is fine."""
    params, plan, adapter, want = setup

    @jax.jit
    def run(params, adapter, x):
        inner = lj.plan(fn, params, x, config=config())
        assert inner.sites == plan.sites
        return lj.apply(fn, inner)(params, adapter, x)

    agrees(run(params, adapter, X), want, fn(params, X))


def test_inside_another_apply(setup):
    """An adapted function adapted again: two adapters on one base, each with its scale."""
    params, plan, adapter, _ = setup
    inner = lj.apply(fn, plan)

    def outer_fn(params, x):
        return inner(params, adapter, x)

    again = lj.plan(outer_fn, params, X, config=config(rank=2, alpha=3.0))
    assert {s.name for s in again.sites} == {"up.kernel", "down.kernel"} and not again.materialised
    second = random_adapter(again, np.float32, seed=8)
    got = jax.jit(lj.apply(outer_fn, again))(params, second, X)
    with jax.enable_x64(True):
        both = merged_params(merged_params(cast(PARAMS, np.float64), adapter), second)
        want = np.asarray(fn(both, np.asarray(X, np.float64)))
        one = np.asarray(fn(merged_params(cast(PARAMS, np.float64), second), np.asarray(X, np.float64)))
    agrees(got, want, one)
    agrees(got, want, inner(params, adapter, X))
    gradient = jax.grad(lambda s: lj.apply(outer_fn, again)(params, s, X).sum())(second)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@dataclasses.dataclass
class Output:
    logits: jax.Array
    name: str
    extras: tuple


jax.tree_util.register_dataclass(Output, ["logits", "extras"], ["name"])


def call_anything(p, x, train, options, *, scale=1.0, rng=None, mode="mean", **more):
    """Python values decide; arrays compute."""
    assert isinstance(train, bool) and isinstance(mode, str) and options["depth"] == 2
    y = fn(p, x) * scale
    if train:
        y = y + jax.random.normal(rng, y.shape)
    if more.get("mask") is not None:
        y = jnp.where(more["mask"][:, None], y, 0)
    y = getattr(y, mode)(0)
    return {
        "out": Output(y, mode, (None, 3, np.arange(2), x.dtype)),
        "flag": train,
        "none": None,
        "pair": (y.sum(), "s"),
    }


def test_arguments_and_results_of_all_kinds(setup):
    params, _, adapter, _ = setup
    kwargs = dict(scale=2.0, rng=jax.random.key(3), mode="sum", mask=np.array([True, True, False, True, True]))
    args = (X, True, {"depth": 2, "unused": None})
    plan = lj.plan(call_anything, params, *args, config=config(), **kwargs)
    got = lj.apply(call_anything, plan)(params, adapter, *args, **kwargs)
    base = call_anything(params, *args, **kwargs)
    assert jax.tree.structure(got) == jax.tree.structure(base)
    assert isinstance(got["out"], Output) and got["out"].name == "sum" and got["flag"] is True and got["none"] is None
    assert got["out"].extras[:2] == (None, 3) and got["out"].extras[3] == jnp.float32 and got["pair"][1] == "s"
    np.testing.assert_array_equal(got["out"].extras[2], np.arange(2))
    with jax.enable_x64(True):
        merged = merged_params(cast(PARAMS, np.float64), adapter)
    merged32 = cast(merged, np.float32)
    agrees(got["out"].logits, call_anything(merged32, *args, **kwargs)["out"].logits, base["out"].logits)
    # Planned for training, called for evaluation.
    quiet = lj.apply(call_anything, plan)(params, adapter, X, False, {"depth": 2})
    agrees(quiet["out"].logits, call_anything(merged32, X, False, {"depth": 2})["out"].logits,
           call_anything(params, X, False, {"depth": 2})["out"].logits)  # fmt: skip


def test_key_arrays_as_data(setup):
    """Typed and raw keys, alone and in batches, split inside."""
    params, _, adapter, _ = setup

    def noisy(p, x, keys):
        noise = jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys)
        return fn(p, x) + noise

    for keys in (jax.random.split(jax.random.key(0), 5), jax.random.split(jax.random.PRNGKey(0), 5)):
        plan = lj.plan(noisy, params, X, keys, config=config())
        got = jax.jit(lj.apply(noisy, plan))(params, adapter, X, keys)
        np.testing.assert_allclose(
            got - noisy(params, X, keys), lj.apply(fn, plan)(params, adapter, X) - fn(params, X), atol=1e-5
        )


def test_retracing_is_left_to_jit(setup):
    params, plan, adapter, _ = setup
    traces = []

    def counted(p, x):
        traces.append(1)
        return fn(p, x)

    jitted = jax.jit(lj.apply(counted, plan))
    for i in range(3):
        jitted(params, adapter, X + i)
    assert len(traces) == 1


def test_other_shapes_of_data_need_no_new_plan(setup):
    params, plan, adapter, _ = setup
    for shape in ((1, 6), (2, 3, 6), (6,)):
        x = normal(*shape)
        got = lj.apply(fn, plan)(params, adapter, x)
        merged = (
            cast(merged_params(cast(PARAMS, np.float64), adapter), np.float32) if False else lj.merge(params, adapter)
        )
        agrees(got, fn(merged, x), fn(params, x))


def test_the_base_is_untouched(setup):
    """The same arrays before and after, and no leaf of the result is one of them."""
    params, plan, adapter, _ = setup
    leaves = jax.tree.leaves(params)
    before = [np.array(leaf) for leaf in leaves]
    lj.apply(fn, plan)(params, adapter, X)
    jax.grad(lambda a: lj.apply(fn, plan)(params, a, X).sum())(adapter)
    for leaf, same, values in zip(jax.tree.leaves(params), leaves, before, strict=True):
        assert leaf is same
        np.testing.assert_array_equal(leaf, values)


def test_numpy_parameters(setup):
    params, plan, adapter, want = setup
    numpy_params = jax.tree.map(np.asarray, params)
    numpy_adapter = jax.tree.map(np.asarray, adapter)
    agrees(lj.apply(fn, plan)(numpy_params, numpy_adapter, np.asarray(X)), want, fn(params, X))


def test_what_does_not_fit_is_refused(setup):
    params, plan, adapter, _ = setup
    call = lj.apply(fn, plan)
    with pytest.raises(ValueError, match=r"`up.kernel` is \(6, 9\), planned \(6, 8\)"):
        call({"up": {"kernel": jnp.ones((6, 9))}, "down": {"kernel": jnp.ones((9, 4))}}, adapter, X)
    with pytest.raises(ValueError, match=r"missing up/lora_A/kernel \(6, 3\)"):
        call(params, {"down": adapter.to_dict()["down"]}, X)
    with pytest.raises(TypeError, match="parameters must be arrays; these are not: extra"):
        call({**params, "extra": "text"}, adapter, X)
    with pytest.raises(ValueError, match="implementation='gpu'"):
        lj.apply(fn, plan, implementation="gpu")
    with pytest.raises(TypeError, match="`config` must be a LoRAConfig, got dict"):
        lj.plan(fn, params, X, config={"rank": 3})  # type: ignore[arg-type]


def test_derivatives_by_other_arguments_do_not_disturb_each_other(setup):
    """JAX keeps one residual structure for a traced product, whichever arguments it was differentiated by last."""
    params, plan, adapter, _ = setup
    adapted = lj.apply(fn, plan)

    def by_adapter(a):
        return adapted(params, a, X).sum()

    jax.clear_caches()
    want = jax.tree.map(np.asarray, jax.grad(by_adapter)(adapter))
    jax.clear_caches()
    _, linear = jax.linearize(by_adapter, adapter)
    jax.grad(lambda x: adapted(params, adapter, x).sum())(X)
    got = jax.vjp(by_adapter, adapter)[1](jnp.ones(()))[0]
    jax.tree.map(lambda y, w: np.testing.assert_allclose(y, w, rtol=1e-5, atol=1e-5), got, want)
    assert all(np.any(np.abs(w) > 0.1) for w in jax.tree.leaves(want))


def test_second_derivatives(setup):
    """Gradients of gradients, against those of the explicitly merged function."""
    params, plan, adapter, _ = setup
    adapted = lj.apply(fn, plan)
    direction = random_adapter(plan, np.float32, seed=9)

    def explicit(a):
        merged = {
            s.path: params[s.path[0]]["kernel"] + s.scale * jnp.matmul(*a.factors(s), precision="highest")
            for s in plan.sites
        }
        return fn({name: {"kernel": merged[name, "kernel"]} for name in params}, X)

    def second(call):
        def slope(a):
            grads = jax.grad(lambda a: (call(a) ** 2).sum())(a)
            return sum((g * d).sum() for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))

        return jax.jit(jax.grad(slope))(adapter)

    got, want = second(lambda a: adapted(params, a, X)), second(explicit)
    for y, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        bound = 1024 * reference.unit_roundoff(np.float32) * np.abs(w).max()
        assert (
            reference.excess(y, np.asarray(w, np.float64), bound) <= 1 < reference.excess(2 * y, np.asarray(w), bound)
        )


@pytest.mark.parametrize("forward", ["jvp", "jacfwd"])
def test_forward_mode_is_refused(setup, forward):
    params, plan, adapter, _ = setup
    adapted = lj.apply(fn, plan)
    run = {"jvp": lambda f: jax.jvp(f, (X,), (X,)), "jacfwd": lambda f: jax.jacfwd(f)(X)}[forward]
    with pytest.raises(TypeError, match="low-rank product has a reverse-mode derivative only"):
        run(lambda x: adapted(params, adapter, x))
