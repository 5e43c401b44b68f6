"""Checks for a process with two devices: initial values computed from split weights and split data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import inits
from tests.core.harness import config, normal
from tests.core.two_devices import PARAMS, mlp

X = jnp.asarray(normal(12, 6), np.float64)
SPLIT = {"up": P(None, "d"), "down": P("d", None)}


METHODS = {
    "pissa": lambda plan, fn, p, x: inits.pissa(plan, p),
    "loftq": lambda plan, fn, p, x: inits.loftq(plan, p),
    "corda": lambda plan, fn, p, x: inits.corda(plan, fn, p, [x]),
    "lora_ga": lambda plan, fn, p, x: inits.lora_ga(plan, lambda p, x: (fn(p, x) ** 2).sum(), p, [x]),
    "eva": lambda plan, fn, p, x: (inits.eva(plan, fn, p, [x]), p),
}


def run(kind: AxisType, *names: str) -> None:
    """Each method on split weights and data: the merged model, and the base's own sharding, as on one device."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    settings = config(dtype="float64", rank=2)
    plan = lj.plan(mlp, PARAMS, X, config=settings)
    want = {name: METHODS[name](plan, mlp, PARAMS, X) for name in names}
    with jax.set_mesh(mesh):
        on = {name: NamedSharding(mesh, spec) for name, spec in SPLIT.items()}
        params = {name: jax.device_put(leaf, on[name]) for name, leaf in PARAMS.items()}
        # On explicit axes the model states no sharding of `h @ down`, so its rows cannot be split as well.
        x = jax.device_put(X, NamedSharding(mesh, P("d") if kind is AxisType.Auto else P()))
        fn = mlp if kind is AxisType.Auto else stated
        plan = lj.plan(fn, params, x, config=settings)
        for name in names:
            adapter, new_params = METHODS[name](plan, fn, params, x)
            old_adapter, old_params = want[name]
            for key, leaf in new_params.items():
                assert leaf.sharding.is_equivalent_to(on[key], 2), (name, key, leaf.sharding)
                np.testing.assert_allclose(leaf, old_params[key], rtol=1e-9, atol=1e-9, err_msg=name)
            for ours, its in zip(jax.tree.leaves(adapter), jax.tree.leaves(old_adapter), strict=True):
                np.testing.assert_allclose(np.abs(ours), np.abs(its), rtol=1e-7, atol=1e-7, err_msg=name)


def stated(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["up"])
    return jnp.einsum("bi,io->bo", h, params["down"], out_sharding=P())


def automatic() -> None:
    run(AxisType.Auto, "loftq", "lora_ga", "eva")


def explicit() -> None:
    run(AxisType.Explicit, "pissa", "corda")
