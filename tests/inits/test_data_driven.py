"""CorDA and EVA against NumPy in float64, on inputs worked out by hand; and the way back to the original base."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import inits, reference
from tests.core.harness import normal

TOLERANCE = reference.tolerance(np.float64, 1 << 12)


def fn(p, x):
    h = x @ p["w"]
    for layer in p["stack"]:
        h = h + jnp.tanh(h @ layer)
    return h


def small(base=np.float32, **settings):
    params = {"w": normal(6, 8, seed=1).astype(base), "stack": (normal(2, 8, 8, seed=2) / 3).astype(base)}
    # Inputs about a mean that is not zero.
    batches = [normal(30, 6, seed=n).astype(base) + 2 for n in range(3)]
    config = lj.LoRAConfig(**{"rank": 4, "alpha": 6.0, "target_modules": ["w", "stack"], **settings})
    return params, batches, lj.plan(fn, params, batches[0], config=config)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(method):
    with jax.enable_x64(True):
        params, batches, plan = small(np.float64, dtype="float64")
        adapter, new_params = inits.corda(plan, fn, params, iter(batches), method=method)
        changes = {site.name: reference.delta(site, *adapter.factors(site)) for site in plan.sites}
    h = np.concatenate(batches)
    for name, n in (("w", None), ("stack", 0), ("stack", 1)):
        w, part, rest = (
            np.asarray(tree[name] if n is None else tree[name][n]) for tree in (params, changes, new_params)
        )
        c = h.T @ h
        c = c + 0.01 * np.mean(np.diag(c)) * np.eye(len(c))
        u, s, vh = np.linalg.svd(w.T @ c, full_matrices=False)
        kept = slice(0, 4) if method == "ipm" else slice(len(s) - 4, None)
        want = ((u[:, kept] * s[kept]) @ vh[kept] @ np.linalg.inv(c)).T
        bound = 1e4 * TOLERANCE * np.abs(want).max()  # the covariances' condition numbers are up to 1e4
        assert reference.excess(part, want, bound) <= 1 < reference.excess(part, 1.01 * want, bound)
        np.testing.assert_allclose(rest, w - part, atol=1e-12)
        h = h @ w if n is None else h + np.tanh(h @ w)


def components(params, batches):
    """Values, directions (rows) and shares of the variance of every layer's inputs, all batches at once."""
    h = np.concatenate(batches).astype(np.float64)
    inputs = [h]
    h = h @ params["w"]
    for layer in params["stack"]:
        inputs.append(h)
        h = h + np.tanh(h @ layer)
    out = []
    for x in inputs:
        _, s, vh = np.linalg.svd(x - x.mean(0), full_matrices=False)
        out.append((s, vh, s**2 / (s**2).sum()))
    return out


def test_eva():
    params, batches, plan = small()
    adapter = inits.eva(plan, fn, params, iter(batches), whiten=True)  # at most 8 components: nothing is forgotten
    want = components(params, batches)
    shares = np.concatenate([share for _, _, share in want])
    least = np.sort(shares)[-3 * 4]
    given = [int((share >= least).sum()) for _, _, share in want]
    assert sum(given) == 12 and len(set(given)) > 1
    ranks = [given[0], max(given[1:])]
    sites = {site.name: site for site in adapter.sites}
    assert [sites[name].rank for name in ("w", "stack")] == ranks
    assert all(site.scale == pytest.approx(1.5) for site in adapter.sites)
    layers = [adapter["lora_A"]["w"], *adapter["lora_A"]["stack"]]
    for a, n, (s, vh, _) in zip(layers, given, want, strict=True):
        a = np.asarray(a).T
        assert not a[n:].any()
        a = a[:n] * np.sqrt(s[:n, None])
        np.testing.assert_allclose(np.abs((a * vh[:n]).sum(1)), 1, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-4)
    assert not any(np.any(b) for b in jax.tree.leaves(adapter["lora_B"]))
    # Other data have other components.
    other = components(params, batches[:1])
    assert np.abs((np.asarray(layers[1]).T[:2] * other[1][1][:2]).sum(1)).min() < 0.9999


def test_eva_trains_and_stops():
    params, batches, plan = small()
    adapter = inits.eva(plan, fn, params, itertools.cycle(batches[:1]), tau=0.99)
    full = inits.eva(plan, fn, params, batches[:1])
    np.testing.assert_allclose(
        *(abs(np.asarray(a["lora_A"]["w"])[:, :2]) for a in (adapter, full)), atol=1e-3
    )  # fmt: skip
    # Columns that were not given stay out of training.
    full = inits.eva(plan, fn, params, batches)
    grads = jax.grad(lambda a: (lj.apply(fn, plan)(params, a, batches[0]) ** 2).sum())(full)
    unused = ~np.asarray(full["lora_A"]["stack"]).any(1)
    assert unused.any() and not np.asarray(grads["lora_B"]["stack"])[unused].any()
    assert np.asarray(grads["lora_B"]["stack"])[~unused].any(-1).all()
    with pytest.raises(ValueError, match="batches` ended before every component had settled.*itertools.cycle"):
        inits.eva(plan, fn, params, batches[:1], tau=0.99)
    with pytest.raises(ValueError, match="`stack` is a stack whose layers were given ranks.*adjust_alpha"):
        inits.eva(plan, fn, params, batches, adjust_alpha=False)
    with pytest.raises(ValueError, match="`rho=0.5`"):
        inits.eva(plan, fn, params, batches, rho=0.5)
    kept = inits.eva(plan, fn, params, batches, rho=1, adjust_alpha=False)
    assert kept.sites == plan.sites


@pytest.mark.parametrize("settings", [dict(), dict(use_rslora=True, modules_to_save=["stack"], target_modules=["w"])])
def test_back_to_the_original_base(settings):
    params, batches, plan = small(**settings)
    initial, new_params = inits.pissa(plan, params)
    trained = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape, seed=5), initial)
    plain = inits.to_original(trained, initial, params, new_params)
    assert [site.rank for site in plain.sites if not site.is_full] == [8] * sum(not s.is_full for s in plan.sites)
    run = lj.apply(fn, plan)
    want = np.asarray(run(new_params, trained, batches[0]))
    bound = 1e-5 * np.abs(want).max()
    assert reference.excess(run(params, plain, batches[0]), want, bound) <= 1
    assert reference.excess(run(params, trained, batches[0]), want, bound) > 1e3
    assert reference.excess(run(params, initial, batches[0]), want, bound) > 1e3
    np.testing.assert_allclose(lj.merge(params, plain)["w"], lj.merge(new_params, trained)["w"], atol=1e-5)


def test_what_has_no_way_back():
    params, _, plan = small()
    adapter, quantised = inits.loftq(plan, params)
    with pytest.raises(ValueError, match="differ by more than what `initial` took out: `stack`.*quantised"):
        inits.to_original(adapter, adapter, params, quantised)
    adapter, new_params = inits.pissa(plan, params)
    with pytest.raises(ValueError, match="differ by more"):
        inits.to_original(adapter, adapter, params, params)
    other, _ = inits.pissa(small(rank=2)[2], params)
    with pytest.raises(ValueError, match="other ranks or alphas"):
        inits.to_original(adapter, other, params, new_params)


def test_beside_the_other_things_an_adapter_trains():
    """DoRA's magnitudes are those of the whole weight, or of what LoftQ made of it; a bias on B starts at zero."""
    params, batches, plan = small(use_dora=True)
    run, x = lj.apply(fn, plan), batches[0]
    want = np.asarray(fn(params, x))
    bound = 1e-5 * np.abs(want).max()
    adapter, new_params = inits.pissa(plan, params)
    assert reference.excess(run(new_params, adapter, x), want, bound) <= 1
    norms = np.linalg.norm(params["w"], axis=0)
    np.testing.assert_allclose(adapter["lora_magnitude_vector"]["w"], norms, rtol=1e-5)
    assert reference.excess(run(params, adapter, x), want, bound) > 1e3
    adapter, quantised = inits.loftq(plan, params)
    plain = lj.Adapter({name: adapter[name] for name in ("lora_A", "lora_B")}, small()[2].sites)
    assert reference.excess(run(quantised, adapter, x), lj.apply(fn, small()[2])(quantised, plain, x), bound) <= 1
    _, _, plan = small(lora_bias=True)
    adapter, new_params = inits.olora(plan, params)
    assert not np.any(adapter["lora_bias"]["w"])
    assert reference.excess(lj.apply(fn, plan)(new_params, adapter, x), want, bound) <= 1
    _, _, plan = small(use_qalora=True, qalora_group_size=2)
    with pytest.raises(ValueError, match="`use_qalora` A has one row for several inputs"):
        inits.pissa(plan, params)
