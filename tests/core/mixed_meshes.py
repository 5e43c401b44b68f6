"""More checks for a process with four devices: meshes manual in part, lookups and convolutions under explicit axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from tests.core.harness import config, merged_params, normal, random_adapter
from tests.core.two_devices import AUTO, CONV, MIX, PARAMS, X, check_factors, close, mlp, planned

EXPLICIT = jax.sharding.AxisType.Explicit


def partial_manual() -> None:
    """`shard_map` over one axis of two: inside the model around its products, and around the whole adapted loss."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AUTO, AUTO))

    def around(params, x):
        inner = jax.shard_map(
            lambda up, down, x: lax.psum(jnp.tanh(x @ up) @ down, "d"), mesh=mesh,
            in_specs=(P(None, "d"), P("d", None), P()), out_specs=P(), axis_names={"d"},
        )  # fmt: skip
        return inner(params["up"], params["down"], x)

    # The axis that stays automatic divides one side of each weight.
    specs = {"up": P("m", None), "down": P(None, "m")}
    placed = {n: jax.device_put(w, jax.sharding.NamedSharding(mesh, specs[n])) for n, w in PARAMS.items()}
    for fn in (around, mlp):
        plan, adapter = planned(fn, placed, X)
        assert len(plan.sites) == 2 and not plan.materialised, plan

        def loss(params, adapter, x, mix, fn=fn, plan=plan):
            return (lj.apply(fn, plan)(params, adapter, x) * mix).sum()

        def total(params, adapter, x, mix, loss=loss):
            return lax.psum(loss(params, adapter, x, mix), "d")

        split = P(), P(), P("d"), P("d")
        by_rows = jax.shard_map(total, mesh=mesh, in_specs=split, out_specs=P(), axis_names={"d"})
        got = jax.jit(jax.value_and_grad(by_rows if fn is mlp else loss, argnums=(0, 1, 2)))(placed, adapter, X, MIX)
        value, (of_params, of_adapter, of_x) = got
        merged = jax.tree.map(jnp.asarray, merged_params(PARAMS, adapter))
        plain = jax.jit(jax.value_and_grad(lambda p, x: (mlp(p, x) * MIX).sum(), argnums=(0, 1)))
        want, (of_weights, of_input) = plain(merged, X)
        close((value, of_params, of_x), (want, of_weights, of_input))
        check_factors(plan, adapter, of_adapter, of_weights)
        assert abs(want - plain(PARAMS, X)[0]) > 0.1


TABLE = jnp.asarray(normal(10, 6), np.float64)
IDS = jnp.asarray([[1, 4, 9, 0, 3], [2, 2, 8, 5, 7]])
KERNELS = {
    "plain": (jnp.asarray(normal(3, 6, 8), np.float64), {}),
    "strided": (jnp.asarray(normal(2, 6, 8), np.float64), {"window_strides": (2,)}),
    "grouped": (jnp.asarray(normal(3, 3, 8), np.float64), {"feature_group_count": 2}),
}


def network(settings: dict[str, Any], split: Any) -> Any:
    """An embedding, a convolution, and the table again as a head."""
    convolution = {"window_strides": (1,), "padding": "SAME", "dimension_numbers": CONV, **settings}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        x = params["table"].at[ids].get(out_sharding=split)
        h = lax.conv_general_dilated(x, params["kernel"], **convolution)
        return jnp.einsum("btd,vd->btv", jnp.tanh(h)[..., :6], params["table"])

    return fn


def lookups_and_convolutions() -> None:
    """Rows of data split over a mesh with explicit axes."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(EXPLICIT,))
    for kernel, settings in KERNELS.values():
        params, alone = {"table": TABLE, "kernel": kernel}, network(settings, None)
        fn = network(settings, P("d"))
        mix = normal(*jax.eval_shape(alone, params, IDS).shape).astype(np.float64)
        for rate in (0.0, 0.5):
            with jax.set_mesh(mesh):
                ids = jax.device_put(IDS, P("d"))
                placed = jax.tree.map(lambda w: jax.device_put(w, P()), params)
                plan = lj.plan(fn, placed, ids, config=config(dtype="float64", dropout=rate))
                assert len(plan.sites) == 2 and not plan.materialised, plan
                adapter = random_adapter(plan, np.float64)

                def loss(params, adapter, ids, plan=plan, fn=fn, mix=mix):
                    y = lj.apply(fn, plan)(params, adapter, ids, key=jax.random.key(0))
                    return (y * jax.reshard(jnp.asarray(mix), jax.typeof(y).sharding)).sum()

                got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(placed, adapter, ids)
                value, (of_params, of_adapter) = jax.device_get(got)
                adapter = jax.device_get(adapter)
            merged = jax.tree.map(lambda w: jnp.asarray(np.asarray(w)), merged_params(params, adapter))
            base = jax.jit(jax.value_and_grad(lambda p, f=alone, mix=mix: (f(p, IDS) * mix).sum()))
            want, of_weights = base(merged)
            assert abs(want - base(params)[0]) > 0.1
            if rate == 0:
                close((value, of_params), (want, of_weights))
                check_factors(plan, adapter, of_adapter, of_weights)
            else:
                assert np.isfinite(value) and abs(value - want) > 1e-3
