"""Ranks, scales, names and parts of adapters, and `merge` of what is broken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import reference
from lora_jax.sites import LORA_A, LORA_B
from tests.core.factors import adapter_of, changes, worst
from tests.core.harness import config, normal, random_adapter

NAMES = ("q.kernel", "stack.kernel")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("rslora", [False, True])
def test_a_larger_rank_is_exact(rslora, keys):
    """The product is the same one to the last bit; with a key, what is new can train."""
    adapter = adapter_of(1, 3, 5.0, NAMES, rslora)
    padded, trainable = lj.resize(adapter, 5), lj.resize(adapter, {"q": 5}, key=keys())
    assert [site.rank for site in padded.sites] == [5, 5] and [site.rank for site in trainable.sites] == [5, 3]
    for grown in (padded, trainable):
        for site, old in zip(grown.sites, adapter.sites, strict=True):
            a, b = grown.factors(site)
            np.testing.assert_allclose(site.scale, old.scale, rtol=1e-15)
            np.testing.assert_array_equal(a[..., : old.rank], adapter.factors(old)[0])
        assert worst(changes(grown), changes(adapter)) <= 1
    a, b = trainable.factors(trainable.sites[0])
    assert np.all(np.any(a[:, 3:] != 0, 0)) and not np.any(b[3:])
    assert np.abs(a[:, 3:]).max() <= 7**-0.5
    assert not np.any(padded.factors(padded.sites[0])[0][:, 3:])
    assert worst(changes(lj.rescale(padded, 5 / 3)), changes(adapter)) > 1  # alpha kept, and not the scale


def test_a_smaller_rank_is_the_nearest():
    adapter = adapter_of(1, 3, -5.0, ["q.kernel"], rslora=True)
    (site,) = (small := lj.resize(adapter, 2)).sites
    assert site.rank == 2 and site.rslora and site.scale == pytest.approx(adapter.sites[0].scale)
    u, s, vt = np.linalg.svd(changes(adapter)["q.kernel"])
    want = (u[:, :2] * s[:2]) @ vt[:2]
    bound = reference.tolerance(np.float64, 200) * s[0]
    assert reference.excess(changes(small)["q.kernel"], want, bound) <= 1
    assert reference.excess(changes(adapter)["q.kernel"], want, bound) > 1
    a, b = small.factors(site)
    np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(b), rtol=1e-12)  # shared out evenly
    back = lj.resize(lj.resize(adapter, 6), 3)
    assert worst(changes(back), changes(adapter)) <= 1


def test_rescale():
    adapter = adapter_of(1, names=NAMES)
    want = {name: -1.5 * change for name, change in changes(adapter).items()}
    assert worst(changes(lj.rescale(adapter, -1.5)), want) <= 1 < worst(changes(lj.rescale(adapter, 1.5)), want)

    def fn(p, x):
        return jnp.tanh(x @ p["w"]["kernel"])

    params, x = {"w": {"kernel": normal(6, 5)}}, normal(4, 6)
    plan = lj.plan(fn, params, x, config=config())
    off = lj.rescale(random_adapter(plan, np.float32), 0.0)
    np.testing.assert_array_equal(jax.jit(lj.apply(fn, plan))(params, off, x), jax.jit(fn)(params, x))


def test_parts():
    adapter = adapter_of(1)
    assert [s.name for s in lj.select(adapter, ["q", "stack"]).sites] == ["q.kernel", "stack.kernel"]
    rest = lj.without(adapter, r"(q|stack)")
    assert {s.name for s in rest.sites} == {"o.kernel", "conv.kernel", "table.embedding"} and "q" not in rest
    assert rest["o"]["lora_A"]["kernel"] is adapter["o"]["lora_A"]["kernel"]
    with pytest.raises(ValueError, match="'qq' matches nothing, closest: "):
        lj.select(adapter, ["q", "qq"])


def test_names():
    adapter = adapter_of(1, names=NAMES)
    deeper = lj.rename(adapter, lambda path: ("model", "layers", *path))
    assert [s.name for s in deeper.sites] == ["model.layers.q.kernel", "model.layers.stack.kernel"]
    assert lj.rename(adapter, {"": "model.layers"}).sites == deeper.sites
    back = lj.rename(deeper, {"model.layers": "", "model": "wrong"})
    assert back.sites == adapter.sites
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(adapter), strict=True):
        assert one is other
    with pytest.raises(ValueError, match="begins with encoder; the first one is q.kernel"):
        lj.rename(adapter, {"encoder": "q"})
    with pytest.raises(ValueError, match="two parameters would have one name"):
        lj.rename(adapter, {"q": "w", "stack": "w"})


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda a: lj.resize(a, 0), "must be a positive whole number"),
        (lambda a: lj.resize(a, {"q": 4, "v_proj": 4}), "'v_proj' match no adapted parameter"),
        (lambda a: lj.rescale(a, float("inf")), "must be a finite number"),
    ],
)
def test_bad_arguments(call, says):
    with pytest.raises(ValueError, match=says):
        call(adapter_of(1, names=NAMES))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda a: lj.rescale(a, "2"), "`factor` is a str: write a number"),
        (lambda a: jax.jit(lambda s: lj.rescale(a, s))(2.0), "`factor` is traced: .*an `AdapterBank`'s stack"),
        (lambda a: lj.combine([a], [None]), r"`weights\[0\]` is a NoneType: write a number"),
        (lambda a: lj.combine([a], 1.0), "`weights` is a float: write a list with one number for each adapter"),
        (lambda a: lj.combine(a, [1.0]), r"is one Adapter: write a list, \[adapter\]"),
    ],
)
def test_wrong_types(call, says):
    with pytest.raises(TypeError, match=says):
        call(adapter_of(1, names=["q.kernel"]))


def test_numbers_of_numpy_are_numbers():
    adapter = adapter_of(1, names=["q.kernel"])
    assert lj.resize(adapter, np.int64(5)).sites == lj.resize(adapter, 5).sites
    for two in (np.float32(2), np.asarray(2.0), jnp.asarray(2)):
        assert lj.rescale(adapter, two).sites == lj.rescale(adapter, 2.0).sites


def test_full_copies_are_kept_or_refused():
    site = lj.Site(("head", "kernel"), (3, 2), "float32", "full")
    both = lj.Adapter.from_leaves(
        {**{p: x for p, x in _leaves(adapter_of(1, names=["q.kernel"]))}, ("head", "kernel"): jnp.ones((3, 2))},
        (*adapter_of(1, names=["q.kernel"]).sites, site),
    )
    assert lj.resize(both, 4)["head"]["kernel"] is both["head"]["kernel"]
    assert lj.rename(both, {"head": "score"})["score"]["kernel"] is both["head"]["kernel"]
    with pytest.raises(ValueError, match="`rescale` cannot change: `head.kernel` is trained in full"):
        lj.rescale(both, 2.0)


def _leaves(adapter):
    return [(path, adapter.leaf(path)) for site in adapter.sites for path in map(site.leaf_path, (LORA_A, LORA_B))]


def test_safe_merge():
    def fn(p, x):
        return x @ p["w"]["kernel"]

    params, x = {"w": {"kernel": jnp.asarray(normal(6, 5))}}, normal(4, 6)
    plan = lj.plan(fn, params, x, config=config())
    adapter = random_adapter(plan, np.float32)
    for one, other in zip(
        jax.tree.leaves(lj.merge(params, adapter, safe=True)), jax.tree.leaves(lj.merge(params, adapter)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    before = np.array(params["w"]["kernel"])
    broken = jax.tree.map(lambda leaf: leaf.at[0, 0].set(jnp.nan), adapter)
    with pytest.raises(ValueError, match="not finite in w.kernel: the adapter diverged"):
        lj.merge(params, broken, safe=True)
    np.testing.assert_array_equal(params["w"]["kernel"], before)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    with pytest.raises(ValueError, match="too narrow"):
        lj.merge(narrow, jax.tree.map(lambda leaf: leaf * 1e4, adapter), safe=True)
    with pytest.raises(ValueError, match="do not exist under `jax.jit`"):
        jax.jit(lambda p, a: lj.merge(p, a, safe=True))(params, adapter)
