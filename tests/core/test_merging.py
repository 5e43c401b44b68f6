"""merge and unmerge: one rounding, other leaves untouched, shared arrays refused, tied tables consistent."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import lax

import lora_jax as lj
from lora_jax import reference
from tests.core.harness import cast, config, normal, random_adapter

X = normal(4, 6)
PARAMS = {
    "dense": {"kernel": normal(6, 5), "bias": normal(5)},
    "heads": {"kernel": normal(5, 2, 3)},
    "out": {"kernel": normal(2, 3, 4)},
    "conv": {"kernel": normal(3, 4, 6)},
    "transposed": {"kernel": normal(5, 6)},
    "stack": normal(2, 6, 6),
    "fused": normal(6, 3, 6),
    "table": {"embedding": normal(9, 6)},
}


def model(p, x):
    y = jnp.einsum("bd,dnh->bnh", x @ p["dense"]["kernel"] + p["dense"]["bias"], p["heads"]["kernel"])
    y = jnp.einsum("bnh,nhd->bd", y, p["out"]["kernel"])[None]
    z = lax.conv_general_dilated(y, p["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))[0]
    h = jnp.tanh(z @ p["stack"][0]) @ p["stack"][1] + x @ p["fused"][:, 1]
    return h @ p["transposed"]["kernel"].T, (h + p["table"]["embedding"][:4]) @ p["table"]["embedding"].T


def planned(dtype, fn=model, params=None, x=X, **changes):
    params = cast(PARAMS if params is None else params, dtype)
    plan = lj.plan(fn, params, cast(x, dtype), config=config(**changes))
    return params, plan, random_adapter(plan, np.float32)


def leaves_of(params, plan):
    by_path = dict(zip(*lj.tracing.flatten_params(params)[:2], strict=True))
    return {site.path: np.asarray(by_path[site.path]).astype(np.float64) for site in plan.sites}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounded_once(dtype):
    """The float64 sum rounded to the base's dtype, to within the float32 sum's own error before that rounding."""
    params, plan, adapter = planned(dtype)
    merged = lj.merge(params, adapter)
    assert len(plan.sites) == 8
    got = leaves_of(merged, plan)
    for site, before in ((s, leaves_of(params, plan)[s.path]) for s in plan.sites):
        a, b = adapter.factors(site)
        exact = reference.merged(site, before, a, b)
        size = reference.merged(site, abs(before), abs(np.asarray(a)), abs(np.asarray(b)))
        in_float32 = reference.tolerance("float32", site.rank + 1) * size
        half_step = reference.unit_roundoff(dtype) * (abs(exact) + in_float32)
        assert reference.excess(got[site.path], exact, half_step + in_float32) <= 1
        assert reference.excess(before, exact, half_step + in_float32) > 1
        twice = exact + reference.delta(site, a, b)
        assert reference.excess(twice, exact, half_step + in_float32) > 1
        # Rounding the change to the base's dtype before adding it would round twice, and is told apart.
        if dtype == "bfloat16":
            once = exact.astype(ml_dtypes.bfloat16).astype(np.float64)
            change = reference.delta(site, a, b).astype(ml_dtypes.bfloat16).astype(np.float64)
            twice_rounded = (before + change).astype(ml_dtypes.bfloat16).astype(np.float64)
            assert np.sum(got[site.path] != once) <= 0.01 * once.size < np.sum(twice_rounded != once)
    jax.tree.map(lambda m, p: (m.dtype, m.shape) == (p.dtype, p.shape) or pytest.fail("type"), merged, params)


def test_float64():
    with jax.enable_x64(True):
        params = cast(PARAMS, np.float64)
        plan = lj.plan(model, params, cast(X, np.float64), config=config(dtype="float64"))
        adapter = random_adapter(plan, np.float64)
        merged = leaves_of(lj.merge(params, adapter), plan)
        for site in plan.sites:
            a, b = adapter.factors(site)
            before = leaves_of(params, plan)[site.path]
            size = reference.merged(site, abs(before), abs(np.asarray(a)), abs(np.asarray(b)))
            exact = reference.merged(site, before, a, b)
            assert reference.excess(merged[site.path], exact, reference.tolerance("float64", 4) * size) <= 1


def test_merged_model_equals_adapted_model():
    params, plan, adapter = planned("float32")
    got = lj.apply(model, plan)(params, adapter, X)
    want, base = model(lj.merge(params, adapter), X), model(params, X)
    for y, w, b in zip(got, want, base, strict=True):
        bound = reference.tolerance("float32", 1 << 10) * np.abs(w).max()
        assert reference.excess(y, np.asarray(w, np.float64), bound) <= 1
        assert reference.excess(b, np.asarray(w, np.float64), bound) > 1


@pytest.mark.parametrize("dtype, steps", [("float32", 4), ("bfloat16", 1.5)])
def test_unmerge(dtype, steps):
    """The base comes back up to roundings of the merged weight's size."""
    params, plan, adapter = planned(dtype)
    merged = lj.merge(params, adapter)
    back, before, between = (leaves_of(tree, plan) for tree in (lj.unmerge(merged, adapter), params, merged))
    for path, values in before.items():
        room = steps * reference.unit_roundoff(dtype) * np.maximum(abs(values), abs(between[path])) * 2
        assert reference.excess(back[path], values, room) <= 1 < reference.excess(between[path], values, room)


def test_other_leaves_are_the_same_objects():
    params, plan, adapter = planned("float32", target_modules=["dense", "stack"])
    merged = lj.merge(params, adapter)
    assert merged["heads"]["kernel"] is params["heads"]["kernel"] and merged["dense"]["bias"] is params["dense"]["bias"]
    assert np.any(merged["dense"]["kernel"] != params["dense"]["kernel"]) and np.any(merged["stack"] != params["stack"])


def test_under_jit_and_on_numpy():
    params, plan, adapter = planned("float32")
    want = lj.merge(params, adapter)
    numpy_merged = lj.merge(*(jax.tree.map(np.asarray, tree) for tree in (params, adapter)))
    for got in (jax.jit(lj.merge)(params, adapter), numpy_merged):
        for y, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(y, w, rtol=1e-6, atol=1e-6)


def test_gradients_through_merge():
    def fn(p, x):
        return jnp.tanh(x @ p["dense"]["kernel"])

    params, plan, adapter = planned("float32", fn, {"dense": PARAMS["dense"]})
    through = jax.grad(lambda a: fn(lj.merge(params, a), X).sum())(adapter)
    fused = jax.grad(lambda a: lj.apply(fn, plan)(params, a, X).sum())(adapter)
    for y, w in zip(jax.tree.leaves(fused), jax.tree.leaves(through), strict=True):
        assert np.any(w)
        assert reference.excess(y, np.asarray(w, np.float64), reference.tolerance("float32", 64) * np.abs(w).max()) <= 1


def test_tied_table():
    """One array, looked up and used as the head: one merged table serves both uses."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(9, 6, name="embed")
            return embed.attend(jnp.tanh(embed(ids)))

    ids = np.array([[1, 4, 8]])
    fn = lambda p, ids: Tied().apply({"params": p}, ids)  # noqa: E731
    params, plan, adapter = planned("float32", fn, {"embed": PARAMS["table"]}, ids)
    merged = lj.merge(params, adapter)
    got, want, base = lj.apply(fn, plan)(params, adapter, ids), fn(merged, ids), fn(params, ids)
    bound = reference.tolerance("float32", 64) * np.abs(want).max()
    assert reference.excess(got, np.asarray(want, np.float64), bound) <= 1
    assert reference.excess(base, np.asarray(want, np.float64), bound) > 1


def test_a_shared_array_is_refused():
    shared = jnp.asarray(normal(6, 6))
    params = {"a": {"kernel": shared}, "b": {"kernel": shared}, "c": {"kernel": jnp.asarray(normal(6, 6, seed=2))}}

    def fn(p, x):
        return x @ p["a"]["kernel"] @ p["b"]["kernel"] @ p["c"]["kernel"]

    plan = lj.plan(fn, params, X, config=config(target_modules=["a"]))
    with pytest.raises(ValueError, match="`a.kernel`, `b.kernel` are one shared array; merging"):
        lj.merge(params, random_adapter(plan, np.float32))
    with pytest.raises(ValueError, match="one shared array"):
        lj.unmerge(params, random_adapter(plan, np.float32))
    other = lj.plan(fn, params, X, config=config(target_modules=["c"]))
    merged = lj.merge(params, random_adapter(other, np.float32))
    assert merged["a"]["kernel"] is shared is merged["b"]["kernel"]


def test_saved_modules_are_replaced():
    params, plan, _ = planned("bfloat16", target_modules=["dense"], modules_to_save=["out"])
    adapter = jax.tree.map(lambda leaf: leaf + 1, plan.init(jax.random.key(0), params))
    merged = lj.merge(params, adapter)
    np.testing.assert_array_equal(merged["out"]["kernel"], params["out"]["kernel"] + 1)
    assert merged["out"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="cannot unmerge out.kernel: they were replaced"):
        lj.unmerge(merged, adapter)


def test_what_does_not_fit_is_refused():
    params, plan, adapter = planned("float32", target_modules=["dense"])
    for undo in ("merge", "unmerge"):
        with pytest.raises(TypeError, match=f"`{undo}` needs an Adapter, which knows ranks and roles, got dict"):
            getattr(lj, undo)(params, adapter.to_dict())
    with pytest.raises(ValueError, match=r"`dense.kernel` is \(5, 6\), planned \(6, 5\)"):
        lj.merge({**params, "dense": {"kernel": params["dense"]["kernel"].T}}, adapter)
    with pytest.raises(ValueError, match="`dense.kernel` is missing"):
        lj.merge({}, adapter)


@pytest.mark.parametrize("rslora, scale", [(False, 4 / 3), (True, 4 / 3**0.5)])
def test_scale(rslora, scale):
    params, plan, adapter = planned("float32", target_modules=["dense"], use_rslora=rslora)
    a, b = (np.asarray(f, np.float64) for f in adapter.factors(plan.sites[0]))
    change = np.asarray(lj.merge(params, adapter)["dense"]["kernel"], np.float64) - params["dense"]["kernel"]
    np.testing.assert_allclose(change, scale * a @ b, rtol=1e-4, atol=1e-5)


def test_containers_are_kept():
    """nnx states, boxes and frozen dicts come back as what they were."""
    _, state = nnx.split(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    fn = lambda p, x: nnx.merge(graph, p)(x)  # noqa: E731
    plan = lj.plan(fn, state, X, config=config())
    merged = lj.merge(state, random_adapter(plan, np.float32))
    assert jax.tree.structure(merged) == jax.tree.structure(state) and isinstance(merged["kernel"], nnx.Param)
    boxed = {"w": nn.Partitioned(jnp.asarray(normal(6, 5)), ("data", None))}
    plan = lj.plan(lambda p, x: x @ p["w"].unbox(), boxed, X, config=config())
    assert plan.sites[0].name == "w"
    merged = lj.merge(boxed, random_adapter(plan, np.float32))
    assert merged["w"].names == ("data", None)
