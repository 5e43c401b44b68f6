"""Laws of adapters that hold for all of them: any ranks, scales, variants, orders and batches that hypothesis draws.

Two more stand beside what they are about: that `cat` is exact (test_combining.py), and what `merge` gives for any
layout (test_properties.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import reference
from lora_jax.combining import METHODS
from tests.core import test_many as many
from tests.core.factors import SHAPES, adapter_of, changes, worst
from tests.core.harness import normal

TWO = ("q.kernel", "stack.kernel")
LAWS = settings(max_examples=6, deadline=None, derandomize=True, database=None)
FLOAT64 = reference.tolerance(np.float64, 1 << 10)

# Few different shapes: each is compiled.
ranks, alphas = st.sampled_from([1, 3]), st.sampled_from([0.5, -3.0, 8.0])
variants = st.fixed_dictionaries(
    {
        "rank": ranks,
        "alpha": alphas,
        "use_rslora": st.booleans(),
        "kind": st.sampled_from([{}, {"use_dora": True}, {"lora_bias": True}]),
    }
)


def model(p, x):
    """A dense layer with its bias, heads stored the other way round, a stack of layers."""
    x = x @ p["up"]["kernel"] + p["up"]["bias"]
    x = jnp.einsum("bd,hkd->bhk", x, p["heads"]["weight"]).reshape(len(x), -1) + p["heads"]["bias"].ravel()
    for kernel, bias in zip(p["layers"]["kernel"], p["layers"]["bias"], strict=True):
        x = jnp.tanh(x @ kernel + bias)
    return x


SHAPED = {
    "up": {"kernel": (5, 7), "bias": (7,)},
    "heads": {"weight": (2, 3, 7), "bias": (2, 3)},
    "layers": {"kernel": (2, 6, 6), "bias": (2, 6)},
}
PARAMS = {m: {n: normal(*s, seed=len(m) + len(n)) for n, s in leaves.items()} for m, leaves in SHAPED.items()}
X = normal(4, 5)


def adapted(variant, seed=0):
    """`(params, plan, adapter)` in float64, every leaf of the adapter random; magnitudes positive."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
    settings = {name: value for name, value in variant.items() if name != "kind"}
    config = lj.LoRAConfig(**settings, **variant["kind"], dtype="float64", target_modules="all-linear")
    plan = lj.plan(model, params, X, config=config)
    assert len(plan.sites) == 3
    leaves = {}
    for site in plan.sites:
        for path, shape in site.leaves.items():
            leaf = jnp.asarray(normal(*shape, seed=seed + len(leaves)), jnp.float64)
            leaves[path] = 1 + abs(leaf) if "lora_magnitude_vector" in path else leaf
    return params, plan, lj.Adapter.from_leaves(leaves, plan.sites)


def apart(one, other):
    """The largest difference of two trees, relative to the largest number of the first."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    return max(float(abs(a - b).max()) for a, b in pairs) / max(float(abs(a).max()) for a, _ in pairs)


@LAWS
@given(variants)
def test_unmerging_undoes_merging(variant):
    with jax.enable_x64(True):
        params, _, adapter = adapted(variant)
        merged = lj.merge(params, adapter)
        norms = lj.weight_norms(params, adapter)
        # DoRA's lengths are kept in float32, and dividing by them brings their rounding into the weights.
        bound = reference.tolerance(np.float32, 16) if norms else FLOAT64
        assert apart(merged, lj.unmerge(merged, adapter, norms)) > 1e-3
        assert apart(params, lj.unmerge(merged, adapter, norms)) <= bound
        if "use_dora" not in variant["kind"]:
            assert apart(params, lj.merge(merged, lj.rescale(adapter, -1.0))) <= bound


@LAWS
@given(variants)
def test_disabled_is_the_base(variant):
    """Bit for bit. With a magnitude beside the factors, which a scale does not reach, it is refused."""
    with jax.enable_x64(True):
        params, plan, adapter = adapted(variant)
        run, base = lj.apply(model, plan), model(params, X)
        assert apart(base, run(params, adapter, X)) > 1e-3
        if "use_dora" in variant["kind"]:
            with pytest.raises(ValueError, match="`rescale` cannot change"):
                lj.rescale(adapter, 0.0)
            return
        off = lj.rescale(adapter, 0.0)
        np.testing.assert_array_equal(run(params, off, X), base)
        jax.tree.map(np.testing.assert_array_equal, lj.merge(params, off), params)


@pytest.fixture(scope="module")
def row_by_row():
    """A check of one choice of adapters for the rows, by the model and the bank of test_many.py, compiled once."""
    with jax.enable_x64(True):
        params, plan, bank, adapters = many.setup()
        ways = [jax.jit(lj.apply_many(many.model, plan, selection=how)) for how in ("gathered", "masked")]
        rows = many.TOKENS[:, None]
        alone = {n: many.alone(many.model, plan, params, adapters, [n] * len(rows), rows) for n in NAMES}

    def check(names):
        want = np.concatenate([np.asarray(alone[name][row]) for row, name in enumerate(names)])
        turned = [NAMES[(NAMES.index(name) + 1) % len(NAMES)] for name in names]
        for way in ways:
            got, wrong = (way(params, bank.stack, bank.ids(chosen), many.TOKENS) for chosen in (names, turned))
            assert reference.excess(got, want, many.bound(want)) <= 1 < reference.excess(wrong, want, many.bound(want))
            assert way._cache_size() == 1

    return check


NAMES = ["a", "b", "c", "__base__"]


@settings(LAWS, max_examples=12)
@given(names=st.lists(st.sampled_from(NAMES), min_size=6, max_size=6))
def test_a_row_of_a_batch_is_as_if_alone(row_by_row, names):
    with jax.enable_x64(True):
        row_by_row(names)


@LAWS
@given(ranks, st.sampled_from([0, 2]), alphas, st.booleans(), st.booleans())
def test_a_larger_rank_changes_nothing(rank, more, alpha, rslora, trainable):
    with jax.enable_x64(True):
        adapter = adapter_of(3, rank, alpha, TWO, rslora)
        key = jax.random.key(0) if trainable else None
        grown = lj.resize(adapter, rank + more, key=key)
        assert {site.rank for site in grown.sites} == {rank + more}
        assert worst(changes(grown), changes(adapter)) <= 1 < worst(changes(lj.rescale(grown, 1.01)), changes(adapter))
        assert worst(changes(lj.resize(grown, rank)), changes(adapter), terms=1000) <= 1


# What does not draw for each adapter by its place.
ORDERLESS = [method for method in METHODS if "dare" not in method]


@pytest.mark.parametrize("method", ORDERLESS)
@settings(LAWS, max_examples=2)
@given(
    order=st.permutations(range(3)).filter(lambda order: order != [0, 1, 2]),
    sizes=st.lists(st.floats(0.2, 2), min_size=3, max_size=3, unique=True),
    signs=st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3),
)
def test_the_order_of_adapters_does_not_matter(method, order, sizes, signs):
    """Of those that are combined, with their weights; and of those that are merged, one after the other."""
    with jax.enable_x64(True):
        names = ["q.kernel"]
        weights = [sign * size for size, sign in zip(sizes, signs, strict=True)]
        adapters = [adapter_of(i, 3, 2.0 + i, names) for i in range(3)]
        options = {} if method in ("cat", "svd", "linear") else {"density": 0.5}
        want = changes(lj.combine(adapters, weights, method, **options))
        turned = [adapters[i] for i in order], [weights[i] for i in order]
        assert worst(changes(lj.combine(*turned, method, **options)), want, terms=1000) <= 1
        mixed = changes(lj.combine(turned[0], weights, method, **options))  # the weights of others
        assert worst(mixed, want, terms=1000) > 1
        params = {"q": {"kernel": jnp.asarray(normal(*SHAPES["q.kernel"][0]), jnp.float64)}}
        merged, other = params, params
        for adapter, moved in zip(adapters, turned[0], strict=True):
            merged, other = lj.merge(merged, adapter), lj.merge(other, moved)
        assert apart(merged, other) <= FLOAT64 < apart(merged, lj.merge(params, adapters[0]))


@LAWS
@given(st.sampled_from(["cat", "svd", "linear"]), st.floats(0.2, 2), ranks, st.booleans())
def test_a_negative_weight_negates(method, weight, rank, rslora):
    """And an adapter taken from itself leaves nothing."""
    with jax.enable_x64(True):
        adapter = adapter_of(1, rank, 3.0, TWO, rslora)
        plus, minus = (changes(lj.combine([adapter], [w], method)) for w in (weight, -weight))
        want = {name: -weight * change for name, change in changes(adapter).items()}
        assert worst(minus, want, terms=1000) <= 1 < worst(plus, want, terms=1000)
        nothing = changes(lj.combine([adapter, adapter], [weight, -weight], method))
        for name, change in nothing.items():
            assert np.abs(change).max() <= FLOAT64 * np.abs(want[name]).max()
