"""What every product of a weight is multiplied by, collected by the interpreter and by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax import reference
from lora_jax.inits.collect import collect, last
from lora_jax.inits.corda import SecondMoment
from tests.core.harness import normal
from tests.inits import zoo

X = normal(4, 5, 6)
W = {"w": normal(6, 6, seed=1), "stack": normal(3, 6, 6, seed=2)}
INDEX = np.array([2, 0, 2, 1])
CONV = ("NWC", "WIO", "NWC")


def moment(*inputs):
    rows = [np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in inputs]
    return sum(x.T @ x for x in rows)


def while_steps(p, x):
    return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["w"]), x)


def branches(p, x):
    return lax.cond(x.sum() > 1e9, lambda h: h @ p["w"] * 2, lambda h: h @ p["w"], x) + (x * 2) @ p["w"]


def chosen(p, x):
    return jnp.einsum("bti,bio->bto", x, p["stack"][INDEX])


def all_layers(p, x):
    return jnp.einsum("bti,lio->lbto", x, p["stack"])


def own_derivative(p, x):
    rule = jax.custom_vjp(lambda w, x: x @ w)
    rule.defvjp(lambda w, x: (x @ w, (w, x)), lambda s, g: (g, g))
    return rule(p["w"], x)


def reversed_rows(p, x):
    return x @ (2 * p["w"][::-1]).reshape(2, 3, 6).reshape(6, 6)


def convolved(p, x):
    return lax.conv_general_dilated(x, p["stack"], (2,), ((1, 0),), rhs_dilation=(2,), dimension_numbers=CONV)


def by_groups(p, x):
    return lax.conv_general_dilated(
        jnp.concatenate([x, -3 * x], -1), p["stack"], (1,), "VALID", dimension_numbers=CONV, feature_group_count=2
    )


def ragged(p, x):
    return lax.ragged_dot(x.reshape(-1, 6), p["stack"], jnp.asarray([7, 12, 1], jnp.int32))


def padded(x, left):
    return np.pad(x, ((0, 0), (left, 0), (0, 0)))


def patches(x, offsets, count, step=1):
    return np.concatenate([x[:, o : o + step * count : step][:, :count] for o in offsets], -1)


ROWS = X.reshape(-1, 6)
# The function, the parameter, and its inputs for each layer.
CASES = {
    "while": (while_steps, "w", [[X, np.tanh(X @ W["w"])]]),
    "cond, and a second use": (branches, "w", [[X, 2 * X]]),
    "layers chosen by index": (chosen, "stack", [[X[[1]]], [X[[3]]], [X[[0, 2]]]]),
    "one input for every layer": (all_layers, "stack", [[X]] * 3),
    "a derivative of its own": (own_derivative, "w", [[X]]),
    "rows in another order": (reversed_rows, "w", [[X[..., ::-1]]]),
    "convolution": (convolved, "stack", [[patches(padded(X, 1), (0, 2, 4), 1, 2)]]),
    "grouped convolution": (by_groups, "stack", [[patches(X, (0, 1, 2), 3), patches(-3 * X, (0, 1, 2), 3)]]),
    "grouped product": (ragged, "stack", [[ROWS[:7]], [ROWS[7:19]], [ROWS[19:]]]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_use(case):
    fn, name, inputs = CASES[case]
    roles = {"stack": "lio"} if fn is all_layers else None  # by itself, the plan takes three times the outputs
    plan = lj.plan(fn, W, X, config=lj.LoRAConfig(rank=2, target_modules=[name]), axis_roles=roles)
    got = last(collect(plan, fn, W, [X, jnp.asarray(2 * X)], SecondMoment()))[name]["sum"]
    want = np.stack([moment(*layer) for layer in inputs])
    if case == "while":  # not homogeneous: only the first step's input doubles
        want = want + moment(2 * X, np.tanh(2 * X @ W["w"]))
    else:
        want = 5 * want
    bound = reference.tolerance(np.float32, 200) * np.sqrt(np.einsum("lii,ljj->lij", want, want))
    assert reference.excess(got, want, bound) <= 1
    assert reference.excess(got, want * 1.1, bound) > 1


def test_a_whole_model():
    """Stacks under scan and remat, heads, tables that are multiplied by: against the model written out."""
    params = zoo.params()
    plan = zoo.plan(params, zoo.MULTIPLIED, dtype="float32")
    got = last(collect(plan, zoo.fn, params, [zoo.IDS], SecondMoment()))
    h = params["table"][zoo.IDS]
    inputs = {"heads": [h]}
    h = np.tanh(np.einsum("hdk,btd->bthk", params["heads"], h)).reshape(2, 5, 12)
    inputs["fused"] = [h]
    h = h @ params["fused"].T
    inputs["conv"] = [patches(np.pad(h, ((0, 0), (1, 1), (0, 0))), (0, 1, 2), 5)]
    h = inputs["conv"][0] @ params["conv"].reshape(36, 10)
    inputs["stack"] = []
    for w in params["stack"]:
        inputs["stack"].append(h)
        h = h + np.tanh(h @ w)
    inputs["experts"] = [h, 2 * h]
    y = np.einsum("ebti,eio->bto", np.stack(inputs["experts"]), params["experts"])
    inputs["head"] = [y]
    for name, layers in inputs.items():
        want = np.stack([moment(x) for x in layers])
        np.testing.assert_allclose(got[name]["sum"], want, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_masked_rows_do_not_count():
    keep = np.array([[1, 1, 0, 0, 1]] * 4, bool)
    fn, name, _ = CASES["cond, and a second use"]
    plan = lj.plan(fn, W, X, config=lj.LoRAConfig(rank=2, target_modules=[name]))
    state = last(collect(plan, fn, W, [{"x": X}], SecondMoment(), mask=lambda x: keep))[name]
    np.testing.assert_allclose(state["sum"][0], 5 * moment(X[keep]), rtol=1e-5)
    assert state["rows"] == 2 * keep.sum()
    assert not np.allclose(state["sum"][0], 5 * moment(X), rtol=0.1)


def test_refusals():
    params = zoo.params()

    def run(fn, params, x, names, **more):
        plan = lj.plan(fn, params, x, config=lj.LoRAConfig(rank=2, target_modules=names))
        return last(collect(plan, fn, params, [x], SecondMoment(), **more))

    with pytest.raises(ValueError, match=re.escape("no inputs were seen for `table` (10, 8). Lookups have none")):
        run(zoo.fn, params, zoo.IDS, ["table", "head"])
    with pytest.raises(ValueError, match=re.escape("`stack` layers [1]. ")):
        run(lambda p, x: x @ p["stack"][np.array([0, 2, 0, 2])], W, X, ["stack"])
    with pytest.raises(ValueError, match=r"`mask` has shape \(3,\), and the inputs of `w` are laid out as \(4, 5\)"):
        run(branches, W, X, ["w"], mask=lambda x: jnp.ones(3))
    with pytest.raises(ValueError, match="`w` is used in a `while` loop under `vmap`"):
        run(
            jax.vmap(lambda p, x: lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ p["w"] + 1, x), (None, 0)),
            W,
            X,
            ["w"],
        )
    plan = lj.plan(branches, W, X, config=lj.LoRAConfig(rank=2, target_modules=["w"]))
    with pytest.raises(ValueError, match="`batches` is empty"):
        last(collect(plan, branches, W, [], SecondMoment()))
