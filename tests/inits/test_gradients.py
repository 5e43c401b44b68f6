"""LoRA-GA against NumPy's decomposition of the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import inits
from tests.core.harness import normal

SHAPES = {"w": (6, 8), "stack": (2, 8, 8)}
GAMMA, ALPHA, RANK = 16, 6.0, 3


def fn(p, x):
    h = jnp.tanh(x @ p["w"])
    for layer in p["stack"]:
        h = h + jnp.tanh(h @ layer)
    return h


def loss(p, x, y):
    return ((fn(p, x) - y) ** 2).sum()


GRADIENT = jax.jit(jax.grad(loss))


def problem():
    params = {name: normal(*shape, seed=n) / 3 for n, (name, shape) in enumerate(SHAPES.items())}
    batches = [(normal(20, 6, seed=n), normal(20, 8, seed=9 + n)) for n in range(2)]
    plan = lj.plan(
        fn, params, batches[0][0], config=lj.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=["w", "stack"])
    )
    return params, batches, plan


def expected(direction: str, scale: str, w: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A (in, r) and B (r, out) up to the signs of their columns and rows."""
    u, s, vh = np.linalg.svd(g.T)  # the gradient of the weight as PyTorch stores it
    for_a, for_b = {"ArB2r": ([0, 1, 2], [3, 4, 5]), "ArBr": ([1, 3, 5], [0, 2, 4])}[direction]
    by = w.shape[1] ** 0.25 / GAMMA**0.5
    a, b = vh[for_a].T, by * u[:, for_b].T
    return (a, b * s[for_b, None]) if scale == "stable" else (a * by, b)


@pytest.mark.parametrize(
    "direction, scale",
    # The others: tests/interop/test_peft_inits.py.
    [("ArB2r", "stable"), ("ArBr", "paper")],
)
def test_factors_follow_the_gradient(direction, scale):
    params, batches, plan = problem()
    adapter, new_params = inits.lora_ga(plan, loss, params, iter(batches), direction=direction, scale=scale)
    grads = [GRADIENT(params, *batch) for batch in batches]
    mean = jax.tree.map(lambda a, b: np.asarray(a + b, np.float64) / 2, *grads)
    for site in plan.sites:
        a, b = (np.asarray(x).reshape(-1, *x.shape[-2:]) for x in adapter.factors(site))
        layers = (np.reshape(tree[site.name], (-1, *params[site.name].shape[-2:])) for tree in (params, mean))
        for n, (w, g) in enumerate(zip(*layers, strict=True)):
            want_a, want_b = expected(direction, scale, w, g)
            # float32 decompositions of gradients of about 10, whose singular values are no closer than 0.1
            np.testing.assert_allclose(abs(a[n]), abs(want_a), atol=2e-4)
            np.testing.assert_allclose(abs(b[n]), abs(want_b), atol=2e-4 * np.abs(want_b).max())
    x = batches[0][0]
    got, want = lj.apply(fn, plan)(new_params, adapter, x), fn(params, x)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(fn(new_params, x) - want).max() > 0.05
    # The mean matters: one batch alone has other directions.
    u = np.linalg.svd(np.asarray(grads[0]["w"]))[0]
    assert np.abs(np.abs(u[:, :RANK]) - np.abs(np.linalg.svd(mean["w"])[0][:, :RANK])).max() > 0.01


def test_random_directions_and_keys():
    params, batches, plan = problem()
    draws = [
        inits.lora_ga(plan, loss, params, batches, direction="random", key=jax.random.key(n))[0]["lora_A"]["w"]
        for n in (0, 0, 3)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.allclose(abs(draws[0]), abs(draws[2]), atol=1e-3)


def test_refusals():
    params, batches, plan = problem()
    with pytest.raises(ValueError, match="`batches` is empty"):
        inits.lora_ga(plan, loss, params, [])
    with pytest.raises(ValueError, match="`direction='up'`.*ArB2r"):
        inits.lora_ga(plan, loss, params, batches, direction="up")
    wide = lj.plan(fn, params, batches[0][0], config=lj.LoRAConfig(rank=4, target_modules=["w"]))
    with pytest.raises(ValueError, match="rank <= 3 for `w`.*twice the rank"):
        inits.lora_ga(wide, loss, params, batches)
