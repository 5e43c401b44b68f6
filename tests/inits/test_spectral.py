"""PiSSA and OLoRA on every layout of weight, in float64, against NumPy's decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import inits, reference
from lora_jax.planning import Plan
from tests.inits import zoo

TOLERANCE = reference.tolerance(np.float64, 1 << 12)


def best(m: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(m)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def by_qr(m: np.ndarray, rank: int) -> np.ndarray:
    q, r = np.linalg.qr(m.T)  # as PyTorch stores it
    return (q[:, :rank] @ r[:rank]).T


def starts_as_base(plan: Plan, params, adapter: lj.Adapter, new_params, *args) -> None:
    args = args or (jnp.asarray(zoo.IDS),)
    run = jax.jit(lj.apply(zoo.fn, plan))
    base = jax.jit(zoo.fn)
    want = np.asarray(base(params, *args))
    bound = TOLERANCE * np.abs(want).max()
    assert reference.excess(run(new_params, adapter, *args), want, bound) <= 1
    # The bound that the new base alone, the old one and another scale exceed.
    assert reference.excess(base(new_params, *args), want, bound) > 1e6
    assert reference.excess(run(params, adapter, *args), want, bound) > 1e6
    assert reference.excess(run(new_params, zoo.doubled(adapter), *args), want, bound) > 1e6


@pytest.mark.parametrize(
    "method, expected, scale", [("pissa", best, dict(alpha=-4.0, use_rslora=True)), ("olora", by_qr, dict(alpha=4.0))]
)
def test_every_layout(method, expected, scale):
    with jax.enable_x64(True):
        params = {name: jnp.asarray(w, np.float64) for name, w in zoo.params().items()}
        plan = zoo.plan(params, **scale)
        adapter, new_params = getattr(inits, method)(plan, params)
        starts_as_base(plan, params, adapter, new_params)
        assert len(plan.sites) == len(params)
        for site in adapter.sites:
            change = reference.delta(site, *adapter.factors(site))
            pieces = zip(*(zoo.matrices(site.name, w) for w in (params[site.name], change)), strict=True)
            for w, part in pieces:
                # PEFT's OLoRA does not divide by s.
                want = expected(w, site.rank) * (site.scale if method == "olora" else 1)
                assert reference.excess(part, want, TOLERANCE * np.abs(w).max() * 10) <= 1, site.name
            a, b = adapter.factors(site)
            a, b = (np.asarray(x).reshape(-1, n, m) for x, n, m in (
                (a, site.fan_in, site.rank), (b, site.rank, site.fan_out)
            ))  # fmt: skip
            if method == "pissa":  # A and B share the singular values
                np.testing.assert_allclose((a**2).sum(1), (b**2).sum(2), rtol=1e-9)
            else:
                np.testing.assert_allclose(b @ b.swapaxes(1, 2), np.broadcast_to(np.eye(3), (len(b), 3, 3)), atol=1e-12)


def test_randomised_pissa():
    """Power iterations approach the exact part; whatever they find, the start is the base."""
    spectrum = 0.7 ** np.arange(24)
    u, v = (np.linalg.qr(np.random.default_rng(n).standard_normal((24, 24)))[0] for n in range(2))
    params = {"w": jnp.asarray((u * spectrum) @ v, np.float32)}
    x = jnp.eye(24)

    def fn(p, x):
        return x @ p["w"]

    plan = lj.plan(fn, params, x, config=lj.LoRAConfig(rank=4, alpha=4, target_modules=["w"]))
    optimum = np.linalg.norm(spectrum[4:])
    errors = []
    for iterations in (0, 4):
        adapter, rest = inits.pissa(plan, params, iterations=iterations, key=jax.random.key(1))
        again, _ = inits.pissa(plan, params, iterations=iterations, key=jax.random.key(1))
        assert all(map(np.array_equal, jax.tree.leaves(adapter), jax.tree.leaves(again)))
        errors.append(np.linalg.norm(rest["w"]) / optimum)
        np.testing.assert_allclose(lj.merge(rest, adapter)["w"], params["w"], atol=1e-6)
    assert 1 - 1e-5 < errors[1] < 1.0001 < errors[0], errors
    other, _ = inits.pissa(plan, params, iterations=0, key=jax.random.key(2))
    assert not np.allclose(other.factors(plan.sites[0])[0], adapter.factors(plan.sites[0])[0])


def test_a_bfloat16_base_is_rounded_once():
    params = {name: jnp.asarray(w, jnp.bfloat16) for name, w in zoo.params().items()}
    plan = zoo.plan(params, ["stack"], dtype="float32")
    adapter, new_params = inits.pissa(plan, params)
    assert new_params["stack"].dtype == jnp.bfloat16 and adapter["lora_A"]["stack"].dtype == jnp.float32
    back = np.asarray(new_params["stack"], np.float64) + reference.delta(plan.sites[0], *adapter.factors(plan.sites[0]))
    bound = reference.unit_roundoff(jnp.bfloat16) * np.abs(np.asarray(new_params["stack"], np.float64)) + 1e-6
    assert reference.excess(back, np.asarray(params["stack"], np.float64), bound) <= 1
    assert all(new_params[name] is params[name] for name in params if name != "stack")


def test_refusals():
    params = zoo.params()
    with pytest.raises(ValueError, match=r"rank <= 7 for `head`.*rank is 9.*rank_pattern"):
        inits.pissa(zoo.plan(params, ["head"], rank=9, dtype="float32"), params)
    with pytest.raises(ValueError, match="`iterations=-1`"):
        inits.pissa(zoo.plan(params, ["head"], dtype="float32"), params, iterations=-1)
    broken = params | {"head": params["head"] * np.nan}
    with pytest.raises(ValueError, match="initial factors of `head`.*not finite"):
        inits.pissa(zoo.plan(params, ["head"], dtype="float32"), broken)
    shared = jnp.asarray(params["head"])
    with pytest.raises(ValueError, match="one shared array"):
        inits.olora(zoo.plan(params, ["head"], dtype="float32"), params | {"head": shared, "other": shared})
