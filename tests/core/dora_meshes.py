"""DoRA for a process with two devices: norms over a split axis are those of the whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from tests.core.harness import config, random_adapter
from tests.core.two_devices import AUTO, MIX, PARAMS, X, close, mlp

EXPLICIT = jax.sharding.AxisType.Explicit
ROWS, COLUMNS = P("d", None), P(None, "d")
SPLITS = ({"up": COLUMNS, "down": ROWS}, {"up": ROWS, "down": COLUMNS})


def _planned(fn: Any, params: Any, x: Any) -> tuple[lj.Plan, lj.Adapter]:
    plan = lj.plan(fn, params, x, config=config(dtype="float64", use_dora=True))
    return plan, random_adapter(plan, np.float64)


def _loss(fn: Any, plan: lj.Plan) -> Any:
    def loss(adapter, params, x):
        y = lj.apply(fn, plan)(params, adapter, x)
        mix = MIX if jax.typeof(y).sharding.mesh.empty else jax.reshard(MIX, jax.typeof(y).sharding)
        return (y * mix).sum()

    return loss


def _alone() -> Any:
    plan, adapter = _planned(mlp, PARAMS, X)
    want = jax.jit(jax.value_and_grad(_loss(mlp, plan)))(adapter, PARAMS, X)
    assert abs(want[0] - jax.jit(lambda p: (mlp(p, X) * MIX).sum())(PARAMS)) > 0.1
    return jax.device_get(want)


def automatic() -> None:
    """Weights split by column or by row under `jit`, and by the model's own `shard_map`."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AUTO,))
    want = _alone()

    def inside(up, down, x):
        return lax.psum(jnp.tanh(x @ up) @ down, "d")

    def parallel(params, x):
        mapped = jax.shard_map(inside, mesh=mesh, in_specs=(COLUMNS, ROWS, P()), out_specs=P())
        return mapped(params["up"], params["down"], x)

    for fn, specs in [(mlp, SPLITS[0]), (mlp, SPLITS[1]), (parallel, SPLITS[0])]:
        params = {n: jax.device_put(w, jax.sharding.NamedSharding(mesh, specs[n])) for n, w in PARAMS.items()}
        plan, adapter = _planned(fn, params, X)
        assert not plan.materialised
        close(jax.device_get(jax.jit(jax.value_and_grad(_loss(fn, plan)))(adapter, params, X)), want)


def explicit() -> None:
    """Shardings that are part of the types."""
    want = _alone()
    mesh = jax.make_mesh((2,), ("d",), axis_types=(EXPLICIT,))

    def stated(params, x):
        h = jnp.tanh(jnp.einsum("bi,io->bo", x, params["up"], out_sharding=P()))
        return jnp.einsum("bi,io->bo", h, params["down"], out_sharding=P())

    with jax.set_mesh(mesh):
        for specs in ({"up": P(), "down": P()}, *SPLITS):
            params = jax.tree.map(jax.device_put, PARAMS, specs)
            x = jax.device_put(X, P())
            plan, adapter = _planned(stated, params, x)
            close(jax.device_get(jax.jit(jax.value_and_grad(_loss(stated, plan)))(adapter, params, x)), want)
