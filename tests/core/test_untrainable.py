"""Parameters that no gradient reaches: the plan says so instead of adapting them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from tests.core.harness import check, config, normal

PARAMS = {"w": normal(6, 5), "aux": normal(6, 5), "spare": normal(6, 5), "bias": normal(5)}
X = normal(4, 6)


def notes(plan: lj.Plan) -> dict[str, str]:
    return {row.name: row.note for row in plan.rows if row.site is None}


def with_dead_code(params, x):
    _ = jnp.tanh(x @ params["aux"]) + params["bias"]
    return x @ params["w"]


DEAD = {
    "plain": with_dead_code,
    "in jit": jax.jit(with_dead_code),
    "in remat": jax.checkpoint(with_dead_code),
    "in a loop": lambda p, x: lax.scan(lambda c, _: (c, (c @ p["w"], c @ p["aux"])), x, length=2)[1][0],
}


@pytest.mark.parametrize("name", DEAD)
def test_dead_code(name):
    plan = check(DEAD[name], PARAMS, X)
    assert [site.name for site in plan.sites] == ["w"]
    assert "reaches no output" in notes(plan)["aux"]
    with pytest.raises(ValueError, match="`aux`.*reaches no output"):
        lj.plan(DEAD[name], PARAMS, X, config=config(target_modules=["w", "aux"]))


def test_never_used():
    assert notes(lj.plan(with_dead_code, PARAMS, X, config=config()))["spare"] == "never used"


def test_dead_materialisation_is_not_reported():
    def fn(params, x):
        _ = jnp.tanh(params["w"])
        return x @ params["w"]

    assert not lj.plan(fn, PARAMS, X, config=config(target_modules=["w"])).materialised


STOPPED = {
    "itself": lambda w: lax.stop_gradient(w),
    "its transpose": lambda w: lax.stop_gradient(w.T).T,
    "a function of it": lambda w: jnp.tanh(lax.stop_gradient(w)),
    "under jit": lambda w: jax.jit(lax.stop_gradient)(w),
}


@pytest.mark.parametrize("name", STOPPED)
def test_stop_gradient(name):
    def fn(params, x):
        return x @ params["w"] + x @ STOPPED[name](params["aux"])

    plan = lj.plan(fn, PARAMS, X, config=config())
    assert [site.name for site in plan.sites] == ["w"]
    assert "stop_gradient" in notes(plan)["aux"]
    with pytest.raises(ValueError, match="`aux`.*stop_gradient"):
        lj.plan(fn, PARAMS, X, config=config(target_modules=["aux"]))


def test_a_weight_that_is_stopped_in_one_place_trains_in_the_other():
    table = {"table": normal(7, 5)}

    def fn(params, ids):
        return jnp.tanh(params["table"][ids]) @ lax.stop_gradient(params["table"]).T

    plan = check(fn, table, np.array([[3, 0], [6, 6]]), gradients=False)
    assert (plan.sites[0].op, plan.sites[0].tied) == ("embedding", True)


@pytest.mark.parametrize(
    "name, why", [("spare", "never used"), ("aux", "reaches no output"), ("steps", "not floating point")]
)
def test_modules_to_save(name, why):
    params = {k: jnp.asarray(v) for k, v in PARAMS.items()} | {"steps": jnp.arange(4)}
    kept = config(target_modules=["w"], modules_to_save=[name])
    with pytest.raises(ValueError, match=f"`{name}`.*{why}"):
        lj.plan(lambda p, x: with_dead_code(p, x) * p["steps"][:, None], params, X, config=kept)
