"""`compare` against dense float64 matrices, `extract` out of what was merged, and the status of a set of adapters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import reference
from tests.core.factors import adapter_of, changes, worst
from tests.core.harness import cast, config, normal, random_adapter

NAMES = ("q.kernel", "stack.kernel")
PARAMS = {
    "up": {"kernel": normal(9, 2, 8), "bias": normal(2, 8)},
    "down": {"kernel": normal(3, 16, 9)},
    "norm": {"scale": normal(9)},
}


def model(p, x):
    y = jnp.einsum("bd,dnh->bnh", x * p["norm"]["scale"], p["up"]["kernel"]) + p["up"]["bias"]
    for i in range(3):
        x = x + jnp.tanh(y.reshape(x.shape[0], -1)) @ p["down"]["kernel"][i]
    return x


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_compare():
    one, other = adapter_of(1, 3, names=NAMES), adapter_of(2, 2, 7.0, ("stack.kernel", "q.kernel", "o.kernel"))
    result = lj.compare(one, other)
    assert [row.name for row in result.rows] == ["q.kernel", "stack.kernel[0]", "stack.kernel[1]", "stack.kernel[2]"]
    assert result.only_in_second == ("o.kernel",) and result.only_in_first == ()
    dense = [changes(adapter) for adapter in (one, other)]
    pairs = [[d["q.kernel"], *d["stack.kernel"]] for d in dense]
    bound = reference.tolerance(np.float64, 400)
    for row, x, y in zip(result.rows, *pairs, strict=True):
        sizes = np.linalg.norm(x), np.linalg.norm(y)
        np.testing.assert_allclose(row.norms, sizes, rtol=bound)
        np.testing.assert_allclose(row.cosine, np.sum(x * y) / np.prod(sizes), atol=bound)
        np.testing.assert_allclose(row.relative, np.linalg.norm(x - y) / sizes[0], rtol=bound)
        for angles, left, right in ((row.angles_in, x, y), (row.angles_out, x.T, y.T)):
            u, v = (np.linalg.svd(m)[0][:, :r] for m, r in ((left, 3), (right, 2)))
            cosines = np.linalg.svd(u.T @ v, compute_uv=False)
            np.testing.assert_allclose(np.cos(angles), np.sort(cosines), atol=1e-12)
            assert angles.size == 2
    whole = [np.concatenate([m.ravel() for m in p]) for p in pairs]
    cosine = whole[0] @ whole[1] / np.prod([np.linalg.norm(w) for w in whole])
    np.testing.assert_allclose(result.cosine, cosine, atol=bound)
    assert "stack.kernel[2]" in str(result) and "only in the second: o.kernel" in str(result)


def test_compare_an_adapter_with_itself_and_with_nothing():
    one = adapter_of(1, names=["q.kernel"])
    (row,) = lj.compare(one, lj.resize(one, 6)).rows
    assert row.relative <= 1e-14 and row.cosine == pytest.approx(1, abs=1e-14)
    assert row.angles_in.size == 3 and row.angles_in.max() <= 1e-7 and row.ranks == (3, 6)
    (row,) = lj.compare(one, lj.rescale(one, 0.0)).rows
    assert np.isnan(row.cosine) and row.relative == pytest.approx(1, abs=1e-14) and row.angles_in.size == 0
    (row,) = lj.compare(lj.rescale(one, 0.0), lj.rescale(one, 0.0)).rows
    assert row.relative == 0
    assert np.isinf(lj.compare(lj.rescale(one, 0.0), one).relative)


def planned(rank=3, **changes):
    params = cast(PARAMS, np.float64)
    return params, lj.plan(model, params, normal(4, 9), config=config(rank=rank, dtype="float64", **changes))


def test_extract_what_was_merged(keys):
    """A change of the plan's rank comes back whole, in any layout, from arrays or memory maps."""
    params, plan = planned(target_modules=["up", "down"], alpha_pattern={"down": -2.0})  # a scale of either sign
    adapter = random_adapter(plan, np.float64)
    tuned = jax.tree.map(np.asarray, lj.merge(params, adapter))
    got = lj.extract(plan, params, tuned, key=keys())
    assert got.adapter.sites == plan.sites
    assert worst(changes(got.adapter), changes(adapter), terms=4000) <= 1
    assert all(abs(share - 1) < 1e-12 for share in got.kept.values())
    merged = lj.merge(params, got.adapter)
    np.testing.assert_allclose(merged["up"]["kernel"], tuned["up"]["kernel"], rtol=1e-9, atol=1e-9)


def test_extract_is_near_the_best(keys):
    params, plan = planned(rank=2, target_modules=["up"])
    change = normal(9, 2, 8, seed=5).astype(np.float64)
    tuned = {**params, "up": {**params["up"], "kernel": params["up"]["kernel"] + change}}
    got = lj.extract(plan, params, tuned, key=keys(), oversample=2)
    s = np.linalg.svd(change.reshape(9, 16), compute_uv=False)
    lost = np.linalg.norm(change - changes(got.adapter)["up.kernel"])
    best = np.sqrt(np.sum(s[2:] ** 2))
    assert best * (1 - 1e-12) <= lost <= 1.02 * best
    np.testing.assert_allclose(got.kept["up.kernel"], 1 - (lost / np.linalg.norm(s)) ** 2, rtol=1e-9)
    assert f"{got.kept['up.kernel']:.2%}" in str(got)


def test_extract_loses_nothing_silently(keys):
    params, plan = planned(target_modules=["up"])
    tuned = {**params, "norm": {"scale": params["norm"]["scale"] + 1}}
    with pytest.raises(ValueError, match="`norm.scale` differ between the two models, and the plan does not adapt"):
        lj.extract(plan, params, tuned, key=keys())
    assert lj.extract(plan, params, tuned, key=keys(), partial=True).kept == {"up.kernel": 1.0}
    params, with_norm = planned(target_modules=["up"], modules_to_save=["norm"])
    got = lj.extract(with_norm, params, tuned, key=keys())
    np.testing.assert_array_equal(got.adapter["norm"]["scale"], tuned["norm"]["scale"])
    with pytest.raises(ValueError, match="not two states of one model: `extra` is in one of the two only"):
        lj.extract(plan, params, {**tuned, "extra": np.zeros(2)}, key=keys())
    broken = {**params, "up": {**params["up"], "kernel": params["up"]["kernel"].at[0].set(np.nan)}}
    with pytest.raises(ValueError, match="`up.kernel`: the two models differ by numbers that are not finite"):
        lj.extract(plan, params, broken, key=keys())


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
def test_extract_takes_plans_of_two_factors_only(setting, keys):
    """Else the adapter would lack the leaf of that setting, and nothing would say so before it is used."""
    params, plan = planned(target_modules=["up"], **{setting: True})
    with pytest.raises(ValueError, match=rf"`{setting}` plans something else for `up\.kernel`: plan without"):
        lj.extract(plan, params, params, key=keys())


def test_status():
    pair = {"math": adapter_of(1, 3, names=NAMES), "code": adapter_of(2, 2, names=["q.kernel"])}
    rows = {row.name: row for row in lj.layer_status(pair, active=["code"], frozen=["math"], merged=["math"])}
    assert rows["q.kernel"].requires_grad == {"math": False, "code": True}
    assert rows["q.kernel"].ranks == {"math": 3, "code": 2} and rows["stack.kernel"].available_adapters == ("math",)
    assert rows["stack.kernel"].merged_adapters == ("math",) and rows["q.kernel"].scales["code"] == 2
    params = {"q": jnp.zeros((7, 5)), "stack": jnp.zeros((3, 6, 4))}
    status = lj.model_status(params, pair, active=["code"])
    assert status.trainable_params == 2 * (7 + 5)
    assert status.total_params == 35 + 72 + 3 * 12 + 3 * 3 * 10 + 2 * 12 and status.num_adapter_layers == 2
    with pytest.raises(ValueError, match="there is no adapter 'maths'; there are 'math', 'code'"):
        lj.layer_status(pair, active=["maths"])
