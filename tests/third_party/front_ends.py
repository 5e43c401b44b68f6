"""The same models through `lora_jax.linen.adapt` and `lora_jax.nnx.adapt`: what the functional interface gave."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax as lj
from tests.third_party.check import EVERYTHING, SEED, Case, Measured, Model, bound_of, largest, quick_jit, weighting


def check_linen(case: Case, model: Model, measured: Measured) -> None:
    """The same plan, adapter and output through `apply`."""
    front = model.front_end
    adapted, adapter = lj.linen.adapt(
        model.module,
        model.params,
        EVERYTHING,
        *front.args,
        key=jax.random.key(SEED),
        variables=front.variables,
        **front.kwargs,
    )
    assert adapted.plan.sites == measured.plan.sites
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, adapter, measured.adapter)))

    @quick_jit
    def run(params: Any, lora: Any) -> jax.Array:
        variables = {"params": params, "lora": lora, **front.variables}
        return front.pick(adapted.apply(variables, *front.args, **front.kwargs))

    assert largest(run(model.params, adapter), measured.want) <= measured.bound
    off = jax.tree.map(jnp.zeros_like, adapter)
    assert largest(run(model.params, off), measured.want) > 1e3 * measured.bound


def check_nnx(case: Case, model: Model, measured: Measured) -> None:
    """The same plan, output and gradients of `nnx.LoRAParam`s; the base holds the very arrays it held."""
    front = model.front_end
    before = _arrays(model.module)
    adapted = lj.nnx.adapt(model.module, EVERYTHING, *front.args, rngs=nnx.Rngs(0), **front.kwargs)
    plan = lj.nnx.plan_of(adapted)
    assert plan.sites == measured.plan.sites
    lj.nnx.set_adapter(adapted, measured.adapter)
    # Now, since `nnx.jit` hands back every array it was given as a new one.
    assert all(x is y for x, y in zip(before, _arrays(adapted.base), strict=True))

    @nnx.jit
    def run(module: nnx.Module) -> tuple[Any, Any]:
        def loss(module: Any) -> tuple[jax.Array, jax.Array]:
            y = front.pick(module(*front.args, **front.kwargs))
            return (y * weighting(y.shape)).sum(), y

        gradient, y = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)(module)
        return y, gradient

    y, gradient = run(adapted)
    assert largest(y, measured.want) <= measured.bound
    factors = nnx.to_pure_dict(gradient)["lora"]
    got = lj.Adapter.from_leaves({p: x for p, x in _leaves(factors)}, plan.sites)
    assert len(jax.tree.leaves(factors)) == 2 * len(case.everything)
    for x, want in zip(jax.tree.leaves(got), jax.tree.leaves(measured.gradient), strict=True):
        assert largest(x, want) <= 2 * bound_of(plan, want)

    lj.nnx.set_adapter(adapted, jax.tree.map(jnp.zeros_like, measured.adapter))
    assert largest(run(adapted)[0], measured.want) > 1e3 * measured.bound
    for was, now in zip(before, _arrays(adapted.base), strict=True):
        np.testing.assert_array_equal(was, now)


def _arrays(module: Any) -> list[jax.Array]:
    return [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))]


def _leaves(tree: Any, prefix: tuple[str, ...] = ()) -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value
