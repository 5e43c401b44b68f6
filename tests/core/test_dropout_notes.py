"""What the plan says about dropout is what happens: a note where, and only where, a key changes nothing."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from tests.core.harness import cast, config, normal, random_adapter

X = normal(5, 6)
IDS = np.array([2, 0, 5, 1, 1])
SIZES = np.array([2, 0, 3])
W = normal(6, 6)
STACK = normal(3, 6, 6)
KERNEL = normal(3, 6, 6)


@jax.custom_vjp
def own_rule(x, w):
    return x @ w


own_rule.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


@jax.custom_jvp
def own_jvp(x, w):
    return x @ w


own_jvp.defjvp(lambda primals, tangents: (own_jvp(*primals), primals[0] @ tangents[1] + tangents[0] @ primals[1]))


def convolve(w, x):
    return lax.conv_general_dilated(x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


# Each function returns one output for each use of the weight.
CASES = {
    "product": (lambda w, x: [x @ w], W),
    "transposed product": (lambda w, x: [x @ w.T], W),
    "under jit, remat and scan": (
        lambda w, x: [lax.scan(lambda c, _: (jax.checkpoint(jax.jit(jnp.matmul))(c, w), None), x, None, length=2)[0]],
        W,
    ),
    "behind stop_gradient": (lambda w, x: [x @ w, x @ lax.stop_gradient(w)], W),
    "scanned stack": (lambda w, x: [lax.scan(lambda c, w: (c @ w, None), x, w)[0]], STACK),
    "batched product": (lambda w, x: [jnp.einsum("bi,eio->ebo", x, w)], STACK),
    "experts": (lambda w, x: [lax.ragged_dot(x, w, SIZES)], STACK),
    "matrices picked by index": (lambda w, x: [jnp.einsum("bi,bio->bo", x, w[IDS % 3])], STACK),
    "convolution": (lambda w, x: [convolve(w, x)], KERNEL),
    "lookup": (lambda w, x: [w[IDS]], W),
    "one row": (lambda w, x: [w[jnp.asarray(IDS)[0]] * x], W),
    "tied head": (lambda w, x: [w[IDS], x @ w.T], W),
    "row as an activation": (lambda w, x: [w[IDS] @ x.T], W),
    "formed": (lambda w, x: [x @ jnp.tanh(w)], W),
    "formed and multiplied by": (lambda w, x: [x @ jnp.tanh(w), x @ w], W),
    "formed by its own sum": (lambda w, x: [x @ w, jnp.sort(w, 0)], W),
    "joined": (lambda w, x: [x @ jnp.concatenate([w, w], 1)], W),
    "its own vjp": (lambda w, x: [own_rule(x, w)], W),
    "its own jvp": (lambda w, x: [own_jvp(x, w)], W),
    "its own vjp, and multiplied by": (lambda w, x: [own_rule(x, w), x @ w], W),
    "all three": (lambda w, x: [own_rule(x, w), jnp.tanh(w), w[IDS]], W),
}  # fmt: skip
REASONS = {
    "it is looked up": {"lookup", "one row", "tied head", "row as an activation", "all three"},
    "it is formed in full": {"formed", "formed and multiplied by", "formed by its own sum", "joined", "all three"},
    "a function with its own derivative uses it": {
        "its own vjp", "its own jvp", "its own vjp, and multiplied by", "all three",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_note_tells_what_a_key_does(name):
    use, weight = CASES[name]
    params, x = cast({"w": weight}, np.float32), jnp.asarray(X)

    def fn(params, x):
        return use(params["w"], x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lj.InertDropoutWarning)
        plan = lj.plan(fn, params, x, config=config(dropout=0.5))
    adapter = random_adapter(plan, np.float32)
    adapted = lj.apply(fn, plan)
    off, on = adapted(params, adapter, x), adapted(params, adapter, x, key=jax.random.key(3))
    inert = [bool(jnp.array_equal(y, z)) for y, z in zip(off, on, strict=True)]
    base = fn(params, x)
    assert not any(jnp.allclose(y, z, atol=1e-3) for y, z in zip(off, base, strict=True)), "not adapted"

    note = plan.rows[0].note
    assert note in str(plan)
    start = "dropout has no effect: " if all(inert) else "no dropout where " if any(inert) else ""
    assert note.startswith(start) and bool(note) == bool(start), (inert, note)
    for reason, names in REASONS.items():
        assert (reason in note) == (name in names), note
    assert [w.category for w in caught] == [lj.InertDropoutWarning] * all(inert)


def test_no_notes_without_dropout():
    plan = lj.plan(lambda p, ids: p["w"][ids], {"w": W}, IDS, config=config())
    assert plan.rows[0].note == ""


def test_a_plan_in_which_dropout_acts_somewhere_does_not_warn():
    params = {"table": W, "kernel": W}
    plan = lj.plan(lambda p, ids: p["table"][ids] @ p["kernel"], params, IDS, config=config(dropout=0.5))
    notes = {row.name: row.note for row in plan.rows}
    assert notes == {"table": "dropout has no effect: it is looked up", "kernel": ""}


def test_a_plan_in_which_dropout_acts_nowhere_warns():
    settings = config(dropout=0.5, target_modules=["table"], modules_to_save=["kernel"])
    params = {"table": W, "kernel": W}
    with pytest.warns(lj.InertDropoutWarning, match=r"`dropout=0.5` has no effect .* none of the 2 adapted"):
        lj.plan(lambda p, ids: p["table"][ids] @ p["kernel"], params, IDS, config=settings)
