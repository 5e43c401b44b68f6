"""Products of rows with an adapter each on fused kernels: reference ones, on a CPU."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import reference
from lora_jax.ops import recording
from lora_jax.ops.many import Many, many_contract
from tests.kernels import many_stacks, reference_kernels, reference_many
from tests.kernels.many_stacks import DY, IDS, SCALE, SLOTS, SPEC, TOKENS, A, B, K, N, R, W, X

OPERANDS = X, W, A, B, DY, IDS
WHOLE = (24, K, 4, R, N)


@pytest.mark.parametrize("transposed", [False, True])
def test_against_float64(transposed):
    with reference_kernels.installed() as calls:
        run = jax.jit(many_stacks.run("fused", transposed))
        y, dx, dw, da, db = run(X, W.T if transposed else W, *OPERANDS[2:])
    many_stacks.check((y, dx, dw.T if transposed else dw, da, db))
    assert calls == [("forward", WHOLE), ("backward", WHOLE)]


@pytest.mark.parametrize("mapped", [False, True])
def test_one_row(mapped):
    """An adapter for the whole batch; mapped once more, by XLA."""
    x, dy, ids = X[1:2], DY[1:2], IDS[1:2]
    with reference_kernels.installed() as calls:
        run = many_stacks.run("fused")
        if mapped:
            got = [v[0] for v in jax.jit(jax.vmap(run))(*(v[None] for v in (x, W, A, B, dy, ids)))]
        else:
            got = jax.jit(run)(x, W, A, B, dy, ids)
    want = many_stacks.run("gathered")(x, W, A, B, dy, ids)
    for value, other in zip(got, want, strict=True):
        np.testing.assert_allclose(value, other, rtol=3e-3, atol=3e-3 * float(abs(other).max()))
    assert calls[0] == ("forward", (TOKENS, K, 1, R, N))
    assert abs(np.asarray(want[0] - x @ W, np.float32)).max() > 0.1


def test_xla_agrees_and_is_taken_where_it_is_asked_for():
    with reference_kernels.installed() as calls, recording() as choices:
        many_stacks.check(jax.jit(many_stacks.run("gathered"))(*OPERANDS))
    assert not calls and choices[0].reasons["reference"] == "`selection='gathered'` was asked for"


def test_kernels_are_chosen_and_recorded():
    with reference_kernels.installed() as calls, recording() as choices:
        jax.eval_shape(many_stacks.run(None), *OPERANDS)
    assert calls and str(choices[0]).startswith("reference  M=24, K=64, N=48, R=3")
    assert choices[0].name == "q.kernel" and "4 rows" in choices[0].reasons["xla"]


def test_a_slot_that_diverged_harms_its_own_rows_alone():
    a = np.array(A)
    a[:, 0] = np.nan
    with reference_kernels.installed():
        y, dx, _, da, db = jax.jit(many_stacks.run("fused"))(X, W, a, *OPERANDS[3:])
        good = jax.jit(many_stacks.run("fused"))(*OPERANDS)
    assert np.isnan(y[1]).all() and np.isnan(db[0]).all()
    others = [0, 2, 3]
    np.testing.assert_array_equal(y[np.array(others)], good[0][np.array(others)])
    np.testing.assert_array_equal(dx[np.array(others)], good[1][np.array(others)])
    np.testing.assert_array_equal(da[:, 1:], good[3][:, 1:])
    np.testing.assert_array_equal(db[1:], good[4][1:])


@pytest.mark.parametrize("selection", ["fused", "gathered"])
def test_a_row_of_the_base_that_is_not_finite_harms_no_slot(selection):
    with reference_kernels.installed():
        x = np.where(np.arange(4)[:, None, None] == 2, np.float16("inf"), X)
        *_, da, db = jax.jit(many_stacks.run(selection))(x, *OPERANDS[1:])
        *_, want_a, want_b = jax.jit(many_stacks.run(selection))(*OPERANDS)
    np.testing.assert_array_equal(da, want_a)
    np.testing.assert_array_equal(db, want_b)


@pytest.mark.parametrize("selection", ["fused", "gathered", "masked"])
def test_the_thin_product_has_its_name(selection):
    """By which `jax.checkpoint` may keep it."""
    with reference_kernels.installed():
        assert "name=lora_h" in str(jax.make_jaxpr(many_stacks.run(selection))(*OPERANDS))


def contract(selection, x=X, key=None, rate=0.0, ids=IDS, w=W, y=SPEC.y):
    spec = dataclasses.replace(SPEC, dropout_rate=rate, y=y)
    many = Many(("k", "slot", "r"), ("slot", "r", "n"), SLOTS, selection)
    return jax.vmap(lambda x, i: many_contract(spec, many, x, w, A, B, SCALE, i, key, "q.kernel"))(x, ids)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"key": jax.random.key(0), "rate": 0.5}, "have no dropout"),
        ({"x": X[:, :1]}, "runs of 1 rows are not whole"),
        ({"x": X.astype(np.float32)}, "float32 data and a float16 weight"),
    ],
)
def test_what_kernels_cannot_do_goes_to_xla_or_is_refused_by_name(change, why):
    with reference_kernels.installed() as calls:
        with recording() as choices:
            got = contract(None, **change)
        assert not calls and why in choices[0].reasons["reference"]
        np.testing.assert_allclose(got, contract("gathered", **change), rtol=1e-3, atol=1e-3)
        with pytest.raises(ValueError, match=f"of `q.kernel`.*{why}"):
            contract("fused", **change)


def test_a_weight_on_the_left():
    with reference_kernels.installed() as calls:
        np.testing.assert_array_equal(contract("fused", y=("n", "t")).swapaxes(1, 2), contract("fused"))
    assert calls == [("forward", WHOLE)] * 2


@pytest.mark.parametrize("selection", ["fused", "gathered", "masked"])
def test_forward_mode_says_what_is_wrong(selection):
    with reference_kernels.installed(), pytest.raises(TypeError, match="reverse-mode derivative only"):
        jax.jvp(lambda x: contract(selection, x), (X,), (X,))


def test_rows_with_weights_of_their_own_are_none_for_kernels():
    ws = np.stack([W, 2 * W, W, W])

    def run(selection):
        many = Many(("k", "slot", "r"), ("slot", "r", "n"), SLOTS, selection)
        one = functools.partial(many_contract, SPEC, many)
        return jax.vmap(lambda x, w, i: one(x, w, A, B, SCALE, i, None, "q.kernel"))(X, ws, IDS)

    with reference_kernels.installed() as calls, recording() as choices:
        y = run(None)
        with pytest.raises(ValueError, match="can't run `q.kernel`: a product of rows with weights of their own"):
            run("fused")
    assert not calls and choices[0].reasons["reference"] == "a product of rows with weights of their own"
    np.testing.assert_array_equal(y[1], contract("gathered", w=2 * W)[1])


def test_mapped_once_more_and_differentiated_again():
    xs = jnp.stack([X, X[::-1]])
    with reference_kernels.installed() as calls:
        both = jax.jit(jax.vmap(lambda x: contract("fused", x)))(xs)
        alone = jnp.stack([contract("gathered", x) for x in xs])
        bend = jax.grad(lambda x: jnp.square(jax.grad(lambda x: jnp.square(contract("fused", x)).sum())(x)).sum())
        plain = jax.grad(lambda x: jnp.square(jax.grad(lambda x: jnp.square(contract("gathered", x)).sum())(x)).sum())
        np.testing.assert_allclose(both, alone, rtol=2e-3, atol=2e-3)
        got, want = (np.asarray(f(X.astype(F := np.float16) / F(64)), np.float64) for f in (bend, plain))
    assert calls
    assert abs(got - want).max() <= 0.02 * abs(want).max() and abs(want).max() > 0


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 3)])
def test_only_the_gradients_that_are_wanted(wanted, monkeypatch):
    asked, real = [], reference_many.backward

    def backward(*operands, wants, **options):
        asked.append(tuple(wants))
        return real(*operands, wants=wants, **options)

    def loss(*values):
        given = [X, W, A, B]
        for place, value in zip(wanted, values, strict=True):
            given[place] = value
        one = functools.partial(many_contract, SPEC, Many(("k", "slot", "r"), ("slot", "r", "n"), SLOTS, "fused"))
        y = jax.vmap(lambda x, i: one(x, *given[1:], SCALE, i, None))(given[0], IDS)
        return (y * DY).astype(jnp.float32).sum()

    monkeypatch.setattr(reference_many, "backward", backward)
    with reference_kernels.installed():
        got = jax.jit(jax.grad(loss, range(len(wanted))))(*([X, W, A, B][place] for place in wanted))
    assert asked == ([] if wanted == (1,) else [tuple(place in wanted for place in (0, 2, 3))])
    for place, gradient in zip(wanted, got, strict=True):
        value, bound = many_stacks.answers()[1 + place]
        assert reference.excess(gradient, value, bound + 1e-30) <= 1
        assert reference.excess(0 * value, value, bound + 1e-30) > 1
