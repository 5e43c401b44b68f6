"""What has no rule is formed in full: right, listed by the plan, refused on request, warned of where unforeseen."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.core.harness import cast, check, config, normal, random_adapter

X = normal(4, 6)
W = {"w": normal(6, 6)}
MASK = np.tri(6, dtype=np.float32)

FORMED = {
    "masked": (lambda w, x: x @ (w * MASK), ["mul"]),
    "where": (lambda w, x: x @ jnp.where(MASK > 0, w, 0), ["select_n"]),
    "added to": (lambda w, x: x @ (w + jnp.eye(6)) + x @ w, ["add"]),
    "tanh": (lambda w, x: x @ jnp.tanh(w), ["tanh"]),
    "times itself": (lambda w, x: x @ (w * w), ["mul"]),
    "normalised": (lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)), ["div", "mul"]),
    "clipped": (lambda w, x: x @ jnp.clip(w, -0.7, 0.7), ["max"]),
    "inverse": (lambda w, x: jnp.linalg.solve(w + 6 * jnp.eye(6), x.T).T + x @ w, ["add"]),
    "determinant": (lambda w, x: x @ w * jnp.linalg.det(w), ["lu"]),
    "joined with data": (lambda w, x: (x @ jnp.concatenate([w, x.T], axis=1), x @ w), ["concatenate"]),
    "padded": (lambda w, x: jnp.pad(x, ((0, 0), (0, 2))) @ jnp.pad(w, ((0, 2), (0, 0))) + x @ w, ["pad"]),
    "cut across merged axes": (lambda w, x: (x @ w, x @ w.ravel()[3:27].reshape(6, 4)), ["slice"]),
    "reshaped across axes": (lambda w, x: (x @ w, x[:, :4] @ w.reshape(4, 9)), ["reshape"]),
    "sum": (lambda w, x: x @ w + w.sum(), ["reduce_sum"]),
    "penalty": (lambda w, x: (x @ w, jnp.abs(w).sum()), ["abs"]),
    "returned": (lambda w, x: (x @ w, w), ["output"]),
    "as a bias too": (lambda w, x: x @ w + w[0], ["add"]),
    "sorted": (lambda w, x: x @ w + jnp.sort(w, axis=0)[:4], ["sort"]),
    "scatter": (lambda w, x: x @ w.at[0].set(1.0) + x @ w, ["scatter"]),
    "cumulative": (lambda w, x: x @ w + jnp.cumsum(w, 0)[:4], ["cumsum"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMED)
def test_formed(name):
    use, primitives = FORMED[name]
    check(lambda p, x: use(p["w"], x), W, X, materialised=primitives)


def masked(p, x):
    return jnp.tanh(x @ p["w"]) @ (p["v"] * MASK)


PARAMS = {"v": normal(6, 6), "w": normal(6, 6, seed=1)}


def test_the_plan_names_parameter_primitive_and_shape():
    plan = lj.plan(masked, cast(PARAMS, np.float32), X, config=config())
    assert plan.materialised == (("v", "mul", (6, 6)),)
    table = str(plan).splitlines()
    assert next(line for line in table if line.startswith("v ")).endswith("formed in full by mul")
    assert "formed" not in next(line for line in table if line.startswith("w "))


def test_refused_on_request():
    params = cast(PARAMS, np.float32)
    with pytest.raises(ValueError, match=r"formed in full at every call: `v` \(6, 6\) by `mul`.*exclude_modules"):
        lj.plan(masked, params, X, config=config(), materialise="error")
    plan = lj.plan(masked, params, X, config=config(target_modules=["w"]), materialise="error")
    assert [s.name for s in plan.sites] == ["w"]
    with pytest.raises(ValueError, match="materialise='warn'`: write 'report' or 'error'"):
        lj.plan(masked, params, X, config=config(), materialise="warn")


def test_a_warning_where_the_plan_did_not_foresee_it():
    def fn(p, x, mask):
        return x @ (p["w"] if mask is None else p["w"] * mask)

    params = cast(W, np.float32)
    plan = lj.plan(fn, params, X, None, config=config())
    adapter = random_adapter(plan, np.float32)
    call = lj.apply(fn, plan)
    with pytest.warns(lj.MaterialisedWarning, match=r"`w` \(6, 6\) is formed in full by `mul`"):
        got = call(params, adapter, X, MASK)
    np.testing.assert_allclose(got, fn(lj.merge(params, adapter), X, MASK), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(params, adapter, X, None)
        foreseen = lj.plan(fn, params, X, MASK, config=config())
        lj.apply(fn, foreseen)(params, adapter, X, MASK)


def test_no_warning_for_weights_that_are_not_adapted():
    params = cast(PARAMS, np.float32)
    plan = lj.plan(masked, params, X, config=config(target_modules=["w"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lj.apply(masked, plan)(params, random_adapter(plan, np.float32), X)


def test_parameters_that_are_no_weights_say_why():
    params = {
        "w": normal(6, 4), "bias": normal(4), "table": normal(6, 4), "ids": np.arange(3), "unused": normal(2, 2),
        "scalar": np.float32(2.0),
    }  # fmt: skip

    def fn(p, x):
        return (x @ p["w"] + p["bias"]) * p["scalar"] + p["table"].sum() + p["ids"].sum()

    plan = lj.plan(fn, params, X, config=config(target_modules="all-linear"))
    notes = {row.name: row.note for row in plan.rows}
    assert notes == {
        "w": "", "bias": "a vector", "table": "never contracted (used by reduce_sum)", "ids": "not floating point",
        "unused": "never used", "scalar": notes["scalar"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"`table` \(6, 4\): never contracted \(used by reduce_sum\)"):
        lj.plan(fn, params, X, config=config(target_modules=["table"]))


def test_integer_products_form_the_weight():
    """A quantised product: rounding to int8 has no low-rank form."""

    def fn(p, x):
        q = jnp.round(p["w"] * 16).astype(jnp.int8)
        return (x @ q.astype(x.dtype)) / 16 + x @ p["w"]

    check(fn, W, X, materialised=["round"])


def test_a_weight_times_itself_has_no_data():
    params = cast(W, np.float32)
    with pytest.raises(ValueError, match=r"`w` \(6, 6\): never contracted \(used by dot_general\)"):
        lj.plan(lambda p, x: x @ (p["w"] @ p["w"]), params, X, config=config())


def test_stated_roles():
    """`axis_roles` overrules the trace, and is checked."""
    params = cast({"w": normal(3, 6, 4)}, np.float32)

    def fn(p, x):
        return jnp.einsum("td,edf->etf", x, p["w"])

    def planned(roles):
        return lj.plan(fn, params, X, config=config(), axis_roles=roles)

    assert planned({"w": "lio"}).sites[0].a_shape == (3, 6, 3)
    check(fn, {"w": normal(3, 6, 4)}, X, axis_roles={"w": "lio"})
    with pytest.raises(ValueError, match=r"'io' do not fit shape \(3, 6, 4\): write one letter per axis"):
        planned({"w": "io"})
    with pytest.raises(ValueError, match="names no parameter: v"):
        planned({"v": "lio"})
    with pytest.raises(ValueError, match="at least one i and one o"):
        planned({"w": "lii"})


def test_the_plan_allocates_nothing():
    """A weight of a petabyte can be planned."""
    shape = jax.ShapeDtypeStruct((1 << 25, 1 << 23), jnp.float32)
    plan = lj.plan(
        lambda p, x: x @ p["w"], {"w": shape}, jax.ShapeDtypeStruct((2, 1 << 25), jnp.float32), config=config()
    )
    assert plan.count() == 3 * ((1 << 25) + (1 << 23)) and plan.count_all() == 1 << 48
