"""Checks for a process with two devices; each compares with the same model on merged parameters, unsharded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import reference
from lora_jax.ops import dropout
from tests.core.harness import config, merged_params, normal, random_adapter

jax.config.update("jax_enable_x64", True)
CONV = ("NWC", "WIO", "NWC")
AUTO = jax.sharding.AxisType.Auto
PARAMS = {"up": jnp.asarray(normal(6, 8), np.float64), "down": jnp.asarray(normal(8, 4), np.float64)}
X = jnp.asarray(normal(4, 6), np.float64)
MIX = jnp.asarray(normal(4, 4, seed=5), np.float64)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


def convolved(params: Any, x: jax.Array) -> jax.Array:
    """The same with a convolution of width one in between."""
    h = lax.conv_general_dilated(x[..., None, :] @ params["up"], params["mix"], (1,), "SAME", dimension_numbers=CONV)
    return jnp.tanh(h)[..., 0, :] @ params["down"]


def planned(fn: Callable[..., Any], params: Any, *args: Any) -> tuple[lj.Plan, lj.Adapter]:
    plan = lj.plan(fn, params, *args, config=config(dtype="float64"))
    return plan, random_adapter(plan, np.float64)


def close(got: Any, want: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), got, want)


def inside_shard_map() -> None:
    """Data-parallel training: the whole adapted loss inside `shard_map`, parameters replicated, data split."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AUTO,))
    kernels = PARAMS | {"mix": jnp.asarray(normal(1, 8, 8), np.float64)}
    plan, adapter = planned(convolved, kernels, X)

    def loss(params, adapter, x, mix):
        return (lj.apply(convolved, plan)(params, adapter, x) * mix).sum()

    def total(params, adapter, x, mix):
        return lax.psum(loss(params, adapter, x, mix), "d")

    sharded = jax.shard_map(total, mesh=mesh, in_specs=(P(), P(), P("d"), P("d")), out_specs=P())
    got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2)))(kernels, adapter, X, MIX)
    close(got, jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(kernels, adapter, X, MIX))
    grads_inside = jax.shard_map(
        jax.grad(total, argnums=1), mesh=mesh, in_specs=(P(), P(), P("d"), P("d")), out_specs=P()
    )  # fmt: skip
    close(jax.jit(grads_inside)(kernels, adapter, X, MIX), got[1][1])
    base = jax.jit(lambda params: (convolved(params, X) * MIX).sum())
    close(got[0], base(merged_params(kernels, adapter)))
    assert abs(got[0] - base(kernels)) > 0.1


def around_shard_map() -> None:
    """A model that is tensor-parallel by itself: `shard_map` around its products, the weights split on every axis."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AUTO,))

    def block(up, down, x):
        return lax.psum(jnp.tanh(x @ up) @ down, "d")

    def gathered(up, down, x):
        return jnp.tanh(lax.psum(x @ up, "d")) @ down

    heads = PARAMS["up"].reshape(6, 4, 2)
    cases = [
        (block, PARAMS["up"], P(None, "d"), PARAMS["down"], P("d", None), P(), P(), []),
        (gathered, PARAMS["up"], P("d", None), PARAMS["down"], P(None, "d"), P(None, "d"), P(None, "d"), []),
        (block, heads, P(None, "d"), PARAMS["down"], P("d"), P(), P(), []),  # flattened heads: the outer atom is split
        (block, heads[:, :3], P(None, "d"), PARAMS["down"][:6], P("d"), P(), P(), ["shard_map"]),  # one and a half each
    ]
    for inner, up, up_spec, down, down_spec, x_spec, out_spec, formed in cases:

        def fn(params, x, inner=inner, specs=(up_spec, down_spec, x_spec), out_spec=out_spec):
            up = params["up"].reshape(6, -1)
            return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=out_spec)(up, params["down"], x)

        params = {"up": up, "down": down}
        plan, adapter = planned(fn, params, X)
        assert len(plan.sites) == 2 and [m[1] for m in plan.materialised] == formed, plan
        merged = jax.tree.map(jnp.asarray, merged_params(params, adapter))
        (_, y), (of_weights, of_adapter) = with_gradients(lj.apply(fn, plan), 2)(params, adapter, X)
        base = with_gradients(fn, 1)
        (_, want), (of_merged,) = base(merged, X)
        close((y, of_weights), (want, of_merged))
        assert np.abs(y - base(params, X)[0][1]).max() > 0.1
        check_factors(plan, adapter, of_adapter, of_weights)


def with_gradients(fn: Callable[..., Any], trees: int) -> Callable[..., Any]:
    """`((loss, result), gradients)` by the first `trees` arguments, in one program."""

    def loss(*args):
        y = fn(*args)
        return (y * MIX).sum(), y

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(trees)), has_aux=True))


def check_factors(plan: lj.Plan, adapter: lj.Adapter, got: lj.Adapter, of_weights: Any) -> None:
    for site in plan.sites:
        want = reference.factor_gradients(site, *adapter.factors(site), np.asarray(of_weights[site.name]))
        close(got.factors(site), want)


def explicit_mesh() -> None:
    """Shardings that are part of the types: data or weights split, outputs stated where the types leave them open."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))

    def stated(params, x):
        h = jnp.tanh(jnp.einsum("bi,io->bo", x, params["up"]))
        return jnp.einsum("bi,io->bo", h, params["down"], out_sharding=P("d", None))

    plain, split = {"up": P(), "down": P()}, {"up": P(None, "d"), "down": P("d", None)}
    with jax.set_mesh(mesh):
        for fn, specs, x_spec in [(mlp, plain, P("d", None)), (stated, split, P())]:
            params = jax.tree.map(jax.device_put, PARAMS, specs)
            x = jax.device_put(X, x_spec)
            for rate in (0.0, 0.5):
                plan = lj.plan(fn, params, x, config=config(dtype="float64", dropout=rate))
                adapter = random_adapter(plan, np.float64)

                def loss(params, adapter, x, plan=plan, fn=fn):
                    y = lj.apply(fn, plan)(params, adapter, x, key=jax.random.key(0))
                    return (y * jax.reshard(MIX, jax.typeof(y).sharding)).sum()

                got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params, adapter, x)
                assert np.all(np.isfinite(got[0]))
                if rate == 0:
                    _compare_explicit(jax.device_get(got), jax.device_get(adapter), plan)


def _compare_explicit(got: Any, adapter: lj.Adapter, plan: lj.Plan) -> None:
    """Loss and gradients against the merged model on one device."""
    value, (of_params, of_adapter, of_x) = got
    one = jax.sharding.AbstractMesh((), (), axis_types=())
    with jax.sharding.use_abstract_mesh(one):
        merged = jax.tree.map(lambda w: jnp.asarray(np.asarray(w)), merged_params(jax.device_get(PARAMS), adapter))
        want, grads = jax.jit(jax.value_and_grad(lambda p, x: (mlp(p, x) * MIX).sum(), argnums=(0, 1)))(merged, X)
    close((value, of_params, of_x), (want, *grads))
    check_factors(plan, adapter, of_adapter, grads[0])


def constrained() -> None:
    """`with_sharding_constraint` on weights and activations over a 1x2 mesh: carried through, nothing formed."""
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(AUTO, AUTO))
    specs = {"up": P(None, "model"), "down": P("model", None)}

    def on(spec):
        return jax.sharding.NamedSharding(mesh, spec)

    def fn(params, x):
        w = {name: lax.with_sharding_constraint(leaf, on(specs[name])) for name, leaf in params.items()}
        h = lax.with_sharding_constraint(jnp.tanh(x @ w["up"]), on(P("data", "model")))
        return jax.jit(jnp.matmul, out_shardings=on(P("data", None)))(h, w["down"])

    params = {name: jax.device_put(leaf, on(specs[name])) for name, leaf in PARAMS.items()}
    x = jax.device_put(X, on(P("data", None)))
    plan, adapter = planned(fn, params, x)
    assert len(plan.sites) == 2 and not plan.materialised, plan
    adapted = lj.apply(fn, plan)

    def loss(params, adapter):
        return (adapted(params, adapter, x) * MIX).sum()

    value, (of_params, of_adapter) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, adapter)
    merged = jax.tree.map(jnp.asarray, merged_params(PARAMS, adapter))
    base = with_gradients(mlp, 1)
    (want, _), (of_weights,) = base(merged, X)
    close((value, of_params), (want, of_weights))
    check_factors(plan, adapter, of_adapter, of_weights)
    assert abs(want - base(PARAMS, X)[0][0]) > 0.1
    # No device ever has more than its part of the weight.
    text = jax.jit(adapted).lower(params, adapter, x).compile().as_text()
    assert "f64[6,4]" in text and "f64[6,8]" not in text


def dropout_masks() -> None:
    """Whichever way the input is split over devices, the same elements are dropped."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AUTO,))
    x = jnp.ones((6, 4, 256), jnp.float32)
    want = dropout(x, jax.random.key(3), 0.3)
    assert 0.25 < (want == 0).mean() < 0.35
    run = jax.jit(lambda x, key: dropout(x, key, 0.3))
    for spec in (P("d"), P(None, "d"), P(None, None, "d")):
        split = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        np.testing.assert_array_equal(run(split, jax.random.key(3)), want)
        # Each device draws its own part of the mask, and no other.
        text = run.lower(split, jax.random.key(3)).compile().as_text()
        assert "f32[6,4,256]" not in text and "all-gather" not in text
