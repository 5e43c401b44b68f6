"""Functions inside functions: jit, remat with its policies, cond, switch, custom derivatives, stop_gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.extend.core.primitives import closed_call_p
from jax.interpreters import mlir

import lora_jax as lj
from lora_jax import reference
from tests.core.dataflow import primitives
from tests.core.harness import cast, check, config, merged_params, normal, random_adapter

PARAMS = {"up": normal(6, 8), "down": normal(8, 6)}
X = normal(4, 6)


def mlp(p, x):
    return checkpoint_name(jnp.tanh(x @ p["up"]), "hidden") @ p["down"]


def handed_back(p, x):
    q, y = jax.jit(lambda p, x: (p, x + 1))(p, x)
    return mlp(q, y)


CALLS = {
    "jit": lambda p, x: jax.jit(mlp)(p, x),
    "nested jit": lambda p, x: jax.jit(lambda p, x: jax.jit(mlp)(p, jax.jit(mlp)(p, x)))(p, x),
    "jit with a static argument": lambda p, x: jax.jit(lambda p, n, x: mlp(p, n * x), static_argnums=1)(p, 2, x),
    "jit that hands weights back": handed_back,
    "inlined jit": lambda p, x: jax.jit(mlp, inline=True)(p, x),
    "named_call": lambda p, x: jax.named_call(mlp, name="mlp")(p, x),
    "named_scope": lambda p, x: jax.named_scope("mlp")(mlp)(p, x),
    "vmap": lambda p, x: jax.vmap(lambda row: mlp(p, row))(x),
    "grad": lambda p, x: jax.grad(lambda x: (mlp(p, x) * x).sum())(x),
    "vjp": lambda p, x: jax.vjp(lambda x: mlp(p, x), x)[1](x)[0],
    "jvp": lambda p, x: jax.jvp(lambda x: mlp(p, x), (x,), (x,))[1],
    "linearize": lambda p, x: jax.linearize(lambda x: mlp(p, x), x)[1](x + 1),
}


def test_closed_call():
    """The primitive that stands for a jaxpr called as it is (`eval_jaxpr` in jax >= 0.12)."""

    def fn(p, x):
        closed = jax.make_jaxpr(lambda up, down, x: jnp.tanh(x @ up) @ down)(p["up"], p["down"], x)
        call = closed_call_p.get_bind_params({"call_jaxpr": closed})
        return closed_call_p.bind(p["up"], p["down"], x, **call)[0]

    params = cast(PARAMS, np.float32)
    assert {"closed_call", "eval_jaxpr"} & set(primitives(fn, params, jnp.asarray(X)))
    check(fn, PARAMS, X)


@pytest.mark.parametrize("name", CALLS)
def test_call(name):
    check(CALLS[name], PARAMS, X)


ONE = {"up": PARAMS["up"]}
CALLS_OF_ONE = {
    "vmap over a weight's columns": lambda p, x: jax.vmap(lambda column: x @ column, in_axes=1)(p["up"]),
    "outer products": lambda p, x: (x[:, :, None] * p["up"]).sum(1) + jnp.tanh(x @ p["up"]),
    "repeated for each row": lambda p, x: jnp.einsum("bd,bdf->bf", x, jnp.broadcast_to(p["up"], (4, 6, 8))),
    "repeated, and formed": lambda p, x: jnp.einsum("bd,bdf->bf", x, jnp.tanh(jnp.broadcast_to(p["up"], (4, 6, 8)))),
    "repeated for nothing": lambda p, x: jnp.einsum("bd,kdf->bkf", x, jnp.broadcast_to(p["up"], (3, 6, 8))),
    "jit that rearranges a weight": lambda p, x: x @ jax.jit(lambda w: w.T.reshape(2, 4, 6))(p["up"]).reshape(8, 6).T,
    "remat that casts a weight": lambda p, x: x @ jax.checkpoint(lambda w: w.astype(x.dtype).T)(p["up"]).T,
}


@pytest.mark.parametrize("name", CALLS_OF_ONE)
def test_call_of_one_weight(name):
    # An outer product is no contraction, and a repeat that meets no data of its own is left to the array.
    formed = {"outer products": "mul", "repeated, and formed": "tanh", "repeated for nothing": "dot_general"}
    check(CALLS_OF_ONE[name], ONE, X, materialised=[formed[name]] if name in formed else ())


POLICIES = {
    "none": None,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_only_these_names": jax.checkpoint_policies.save_only_these_names("hidden"),
    "save_anything_except_these_names": jax.checkpoint_policies.save_anything_except_these_names("hidden"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_remat(name):
    check(lambda p, x: jax.checkpoint(mlp, policy=POLICIES[name])(p, x), PARAMS, X)


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable"])
def test_remat_recomputes_what_its_policy_says(policy):
    """The number of products in the gradient follows the policy, as it does in the plain function."""
    params, x = cast(PARAMS, np.float32), jnp.asarray(X)

    def products(wrap):
        def fn(p, x):
            return wrap(mlp)(p, x).sum()

        plan = lj.plan(fn, params, x, config=config())
        counts = []
        for gradient in (jax.grad(fn), jax.grad(lj.apply(fn, plan), argnums=1)):
            args = (params, x) if not counts else (params, random_adapter(plan, np.float32), x)
            counts.append(primitives(gradient, *args).count("dot_general"))
        return counts

    base, adapted = products(lambda f: f)
    base_again, adapted_again = products(lambda f: jax.checkpoint(f, policy=POLICIES[policy]))
    if policy == "dots_saveable":
        assert (base_again, adapted_again) == (base, adapted)
    else:  # again: x·up, and with an adapter its x·A and (x·A)·B, and the next product's x·A
        assert (base_again - base, adapted_again - adapted) == (1, 4)


def up_either_way(p, x):
    return lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ p["up"]), lambda x: jnp.sin(x @ p["up"]), x) @ p["down"]


def hands_a_weight_back(p, x):
    def branch(f):
        return lambda p, x: (p["down"], f(x @ p["up"]))

    w, y = lax.cond(x[0, 0] > 0, branch(jnp.tanh), branch(jnp.sin), p, x)
    return y @ w


def in_a_scan(p, x):
    def step(x, i):
        return lax.cond(i > 0, lambda x: mlp(p, x), jnp.sin, x), None

    return lax.scan(step, x, jnp.arange(3))[0]


def per_row(p, x):
    return jax.vmap(lambda r: lax.cond(r[0] > 0, lambda r: mlp(p, r), lambda r: 2 * mlp(p, r), r))(x)


CONDS = {
    "cond": up_either_way,
    "cond on a number": lambda p, x: lax.cond(True, lambda: mlp(p, x), lambda: mlp(p, -x)),
    "weights as operands": lambda p, x: lax.cond(x[0, 0] > 0, mlp, lambda p, x: 2 * mlp(p, x), p, x),
    "hands a weight back": hands_a_weight_back,
    "switch": lambda p, x: lax.switch(jnp.argmax(x[0]) % 3, [lambda x, k=k: (k + 1) * mlp(p, x) for k in range(3)], x),
    "cond in scan": in_a_scan,
}


@pytest.mark.parametrize("name", CONDS)
def test_cond(name):
    check(CONDS[name], PARAMS, X)


def test_vmapped_cond():
    """jax turns it into a choice between copies of all operands, weights included."""
    check(per_row, PARAMS, X, materialised=["select_n"])


def by_platform(p, x):
    return lax.platform_dependent(
        p["up"], x, cpu=lambda w, x: jnp.tanh(x @ w), tpu=lambda w, x: nothing_for_a_cpu(x @ w),
        default=lambda w, x: x @ w,
    ) @ p["down"]  # fmt: skip


def nothing_for_a_cpu(x):
    """A primitive that only a TPU's compiler knows."""
    return nowhere_p.bind(x)


nowhere_p = Primitive("nowhere")
nowhere_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(nowhere_p, lambda ctx, x: [x], platform="tpu")


def test_branches_by_platform():
    """Only this platform's branch is compiled, so branches may hold kernels for others."""
    check(by_platform, PARAMS, X, gradients=False)


def test_a_branch_that_chooses_a_weight_forms_it():
    def fn(p, x):
        w = lax.cond(x[0, 0] > 0, lambda: p["v"], lambda: p["w"])
        return x @ w + jnp.tanh(x @ p["v"]) + jnp.sin(x @ p["w"])

    check(fn, {"v": normal(6, 6), "w": normal(6, 6, seed=1)}, X, materialised=["cond"])


def test_stop_gradient():
    """Stopped for the factors as it is for the weight, and only where the model says so.

    A plan leaves such a weight out, unless its axes are stated.
    """
    params = cast(PARAMS, np.float32)

    def fn(p, x):
        return (jnp.tanh(x @ lax.stop_gradient(p["up"])) @ p["down"]).sum()

    plan = lj.plan(fn, params, X, config=config(), axis_roles={"up": "io"})
    assert not plan.materialised
    gradient = jax.grad(lj.apply(fn, plan), argnums=1)(params, random_adapter(plan, np.float32), X)
    assert not np.any(gradient["lora_A"]["up"]) and not np.any(gradient["lora_B"]["up"])
    assert np.all(gradient["lora_A"]["down"]) and np.all(gradient["lora_B"]["down"])


def test_stop_gradient_on_one_of_two_uses():
    def fn(p, x):
        return jnp.tanh(x @ lax.stop_gradient(p["w"])) @ p["w"]

    check(fn, {"w": normal(6, 6)}, X)


@jax.custom_jvp
def cube_matmul(x, w):
    return jnp.tanh(x @ w)


@cube_matmul.defjvp
def _cube_matmul_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return cube_matmul(x, w), 3 * (dx @ w) + 5 * (x @ dw)  # wrong on purpose: it must be honoured


@jax.custom_vjp
def odd_matmul(x, w):
    return jnp.tanh(x @ w)


odd_matmul.defvjp(lambda x, w: (odd_matmul(x, w), (x, w)), lambda res, g: (3 * g @ res[1].T, 5 * res[0].T @ g))


@pytest.mark.parametrize("function", [cube_matmul, odd_matmul])
def test_custom_derivatives_are_honoured(function):
    plan = check(lambda p, x: function(function(x, p["up"]), p["down"]), PARAMS, X)
    assert {s.roles for s in plan.sites} == {"io"}


def test_custom_derivatives_with_integers_and_keys():
    """Arguments that have no gradient, in a function that has a rule."""

    @jax.custom_vjp
    def pick(w, i, x):
        return x @ w[i]

    pick.defvjp(
        lambda w, i, x: (pick(w, i, x), (w, i, x)),
        lambda res, g: (jnp.zeros_like(res[0]).at[res[1]].set(7 * res[2].T @ g), None, g @ res[0][res[1]].T),
    )
    check(lambda p, i, x: pick(p["w"], i, x) + x @ p["w"][0], {"w": normal(3, 6, 6)}, np.int32(1), X)


@jax.custom_vjp
def rounded(w):
    return jnp.round(4 * w) / 4


rounded.defvjp(lambda w: (rounded(w), w), lambda w, g: (g * (jnp.abs(w) < 1.5),))


def test_straight_through_estimator():
    """Rounding has no gradient of its own; the estimator's, clipped, must reach A and B."""
    plan = check(lambda p, x: x @ rounded(p["w"]), {"w": normal(6, 5)}, X, materialised=["round"])
    assert plan.sites[0].roles == "io"


def test_library_activations_inside_a_checkpointed_jit():
    """jax.nn's own custom_jvp functions, applied to data."""

    def fn(p, x):
        h = jax.checkpoint(jax.jit(lambda p, x: jax.nn.relu(x @ p["up"]) + jax.nn.silu(x @ p["up"])))(p, x)
        return jax.nn.softmax(jax.nn.gelu(h) @ p["down"]) + jax.nn.logsumexp(h)

    check(fn, PARAMS, X)


def test_named_weights():
    """`checkpoint_name` on a weight itself."""
    check(lambda p, x: x @ checkpoint_name(p["up"], "weights"), {"up": PARAMS["up"]}, X)


def test_debug_print_and_callbacks(capfd):
    """Effects stay where they were."""

    def fn(p, x):
        jax.debug.print("sum {}", x.sum())
        return lax.cond(x[0, 0] > -100, lambda: jnp.tanh(x @ p["up"]), lambda: x @ p["up"]) @ p["down"]

    params = cast(PARAMS, np.float32)
    plan = lj.plan(fn, params, X, config=config())
    adapter = random_adapter(plan, np.float32)
    capfd.readouterr()
    got = jax.jit(lj.apply(fn, plan))(params, adapter, X)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("sum ") == 1
    with jax.enable_x64(True):
        want = np.asarray(fn(merged_params(cast(PARAMS, np.float64), adapter), jnp.asarray(X, np.float64)))
    bound = reference.tolerance(np.float32, 32) * np.abs(want).max()
    assert reference.excess(got, want, bound) <= 1 < reference.excess(fn(params, jnp.asarray(X)), want, bound)


def test_named_scopes():
    """A profile of the adapted model shows the names that a profile of the model shows."""

    def fn(p, x):
        with jax.named_scope("my_block"):
            h = jax.jit(lambda w, x: jnp.tanh(x @ w))(p["up"], x)
        with jax.named_scope("my_head"):
            return h @ p["down"]

    params = cast(PARAMS, np.float32)
    plan = lj.plan(fn, params, X, config=config())
    text = jax.jit(lj.apply(fn, plan)).lower(params, random_adapter(plan, np.float32), X).compile().as_text()
    assert "my_block" in text and "my_head" in text
    assert "my_block/my_head" not in text
