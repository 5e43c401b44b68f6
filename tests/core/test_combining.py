"""`combine` against its formulas in float64 numpy, and the laws that hold for any adapters and weights."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import reference
from lora_jax.combining import METHODS
from lora_jax.sites import LORA_A
from tests.core.factors import SHAPES, adapter_of, changes, site_of, worst

LAWS = settings(max_examples=5, deadline=None, derandomize=True, database=None)
SOME = ("q.kernel", "stack.kernel")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def weighted_sum(adapters, weights):
    total = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, change in changes(adapter).items():
            total[name] = total.get(name, 0.0) + weight * change
    return total


def per_matrix(fn, name, *arrays):
    """`fn` on each matrix of a stack by itself."""
    if SHAPES[name][1][0] != "l":
        return fn(*arrays)
    return np.stack([fn(*parts) for parts in zip(*arrays, strict=True)])


weights_of = st.floats(-2, 2, allow_nan=False).map(lambda w: round(w, 3))


@LAWS
@given(st.lists(st.tuples(weights_of, st.integers(1, 3), st.booleans(), st.booleans()), min_size=1, max_size=3))
def test_cat_is_exact(drawn):
    """For any ranks, scales, signs and for parameters that only some of them adapt; rsLoRA's scale counts once."""
    with jax.enable_x64(True):
        adapters = [
            adapter_of(i, r, 3.0 + i, SOME[:1] if few else SOME, rslora) for i, (_, r, rslora, few) in enumerate(drawn)
        ]
        weights = [w for w, *_ in drawn]
        got = lj.combine(adapters, weights)
        want = weighted_sum(adapters, weights)
        size = weighted_sum(adapters, map(abs, weights))
        for name, value in changes(got).items():
            bound = reference.tolerance(np.float64, 200) * (abs(size[name]) + np.linalg.norm(size[name]))
            assert reference.excess(value, want[name], bound + 1e-300) <= 1
        assert all(site.scale == 1 for site in got.sites)
        ranks = {site.name: site.rank for site in got.sites}
        assert ranks["q.kernel"] == sum(r for _, r, _, _ in drawn)


def test_cat_tells_a_wrong_scale():
    one, other = adapter_of(1), adapter_of(2, rank=2, rslora=True)
    want = weighted_sum([one, other], [0.5, -1.5])
    assert worst(changes(lj.combine([one, other], [0.5, -1.5])), want) <= 1
    assert worst(changes(lj.combine([one, other], [0.5, 1.5])), want) > 1
    assert worst(changes(lj.combine([one], [0.5])), want) > 1
    twice = weighted_sum([one, other], [0.5, -1.5 * 2**0.5])  # alpha / sqrt(r) for alpha / r
    assert worst(twice, want) > 1


def test_svd_is_the_best_approximation():
    names = ("o.kernel", "stack.kernel")
    adapters, weights = [adapter_of(1, names=names), adapter_of(2, rank=2, names=names)], [0.7, -1.1]
    want = weighted_sum(adapters, weights)

    def truncated(rank):
        def one(matrix):
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
            return (u[:, :rank] * s[:rank]) @ vt[:rank]

        return one

    for rank in (None, 9):
        got = lj.combine(adapters, weights, "svd", rank=rank)
        for name, change in changes(got).items():
            shape, roles = SHAPES[name]
            order = [d for role in "lio" for d in range(len(roles)) if roles[d] == role]
            sizes = [np.prod([shape[d] for d in range(len(roles)) if roles[d] == role], dtype=int) for role in "lio"]
            moved, mine = (x.transpose(order).reshape(sizes) for x in (want[name], change))
            best = np.stack([truncated(rank or 3)(matrix) for matrix in moved])
            bound = reference.tolerance(np.float64, 400) * np.linalg.norm(want[name])
            assert reference.excess(mine, best, bound) <= 1
            assert reference.excess(moved, best, bound) > 1 or (rank or 3) >= min(sizes[1:])


def tensors_of(adapters, name):
    """The factors A and B of one parameter, as stacks over the adapters."""
    sites = [next(s for s in adapter.sites if s.name == name) for adapter in adapters]
    pairs = [adapter.factors(site) for adapter, site in zip(adapters, sites, strict=True)]
    return [np.stack([np.asarray(pair[i]) for pair in pairs]) for i in (0, 1)], [site.scale for site in sites]


def kept_largest(tensor, density):
    out = np.zeros(tensor.size)
    order = np.argsort(-abs(tensor.ravel()), kind="stable")[: int(density * tensor.size)]
    out[order] = tensor.ravel()[order]
    return out.reshape(tensor.shape)


def elected_mean(tensors, weights, majority):
    votes = (tensors if majority == "total" else np.sign(tensors)).sum(0)
    agrees = np.sign(tensors) == np.where(votes >= 0, 1, -1)
    return (np.einsum("n,n...->n...", weights, tensors) * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


def reduced(method, tensors, weights, density, majority):
    if "dare" not in method and method != "linear":
        tensors = np.stack([kept_largest(tensor, density) for tensor in tensors])
    if method in ("ties", "dare_ties"):
        return elected_mean(tensors, weights, majority)
    return np.einsum("n,n...->...", weights, tensors)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "ties"])
def test_reductions_of_the_factors(method, majority):
    adapters, weights, density = [adapter_of(i, 3, 2.0 + i, SOME) for i in range(3)], [0.5, -1.25, 2.0], 0.6
    options = {} if method == "linear" else {"density": density}
    if method != "ties" and majority == "frequency":
        with pytest.raises(ValueError, match="elects no signs"):
            lj.combine(adapters, weights, method, majority_sign=majority, **options)
        return
    got = lj.combine(adapters, weights, method, majority_sign=majority, **options)
    for site in got.sites:
        (a, b), scales = tensors_of(adapters, site.name)
        c = np.multiply(weights, scales)
        root = abs(c) ** 0.5
        for mine, tensors, w in zip(got.factors(site), (a, b), (np.sign(c) * root, root), strict=True):

            def one(*stack, w=w):
                return reduced(method, np.stack(stack), w, density, majority)

            want = per_matrix(one, site.name, *tensors)
            bound = reference.tolerance(np.float64, 10) * np.linalg.norm(want)
            assert reference.excess(mine, want, bound) <= 1
            assert reference.excess(np.einsum("n,n...->...", w, tensors), want, bound) > 1 or method == "linear"


@pytest.mark.parametrize("method", [m for m in METHODS if m.endswith("_svd") and "dare" not in m])
def test_reductions_of_the_changes(method):
    adapters, weights, density = [adapter_of(i, 2 + i, 3.0 - i, SOME) for i in range(3)], [0.5, -1.25, 2.0], 0.3
    assert len({adapter.sites[0].scale for adapter in adapters} | {1.0}) == 4
    got = changes(lj.combine(adapters, weights, method, density=density, rank=7))  # full: nothing is cut off
    each = [changes(adapter) for adapter in adapters]
    for name in SOME:

        def one(*stack):
            return reduced(method.removesuffix("_svd"), np.stack(stack), np.asarray(weights), density, "total")

        want = per_matrix(one, name, *(change[name] for change in each))
        bound = reference.tolerance(np.float64, 400) * np.linalg.norm(want)
        assert reference.excess(got[name], want, bound) <= 1
        assert reference.excess(weighted_sum(adapters, weights)[name], want, bound) > 1


@pytest.mark.parametrize("method", ["dare_ties", "dare_ties_svd"])
def test_dare_draws_and_rescales(method, keys):
    """The elements that each adapter keeps are found by leaving the others' weights at zero; then the formula holds."""
    adapters, key, density = [adapter_of(i, 3, 3.0, ["q.kernel"]) for i in range(3)], keys(), 0.5
    on_changes = method.endswith("_svd")
    linear = "dare_linear_svd" if on_changes else "dare_linear"
    options = {"density": density, "key": key, **({"rank": 7} if on_changes else {})}

    def values(adapter):
        if on_changes:
            return [changes(adapter)[name] for name in ["q.kernel"]]
        return [np.asarray(x) for site in adapter.sites for x in adapter.factors(site)]

    alone = [values(lj.combine(adapters, list(row), linear, **options)) for row in np.eye(3)]
    for kept, adapter in zip(alone, adapters, strict=True):
        for x, whole in zip(kept, values(adapter), strict=True):
            bound = reference.tolerance(np.float64, 400) * np.linalg.norm(whole)
            kept_or_not = np.minimum(abs(x), abs(x - whole / density))
            assert reference.excess(kept_or_not, np.zeros(x.shape), bound) <= 1
            share = np.mean(abs(x) > bound)
            assert abs(share - density) <= 4 * (density * (1 - density) / x.size) ** 0.5
    assert all(np.any((abs(x) > 1e-12) != (abs(y) > 1e-12)) for x, y in zip(alone[0], alone[1], strict=True))

    weights = [0.5, 1.25, 2.0]
    got = values(lj.combine(adapters, weights, method, **options))
    for n, mine in enumerate(got):
        stack = np.stack([kept[n] for kept in alone])
        stack[abs(stack) < 1e-12] = 0  # the SVD's rounding of what was dropped
        root = weights if on_changes else np.sqrt(weights)
        want = reduced(method.removesuffix("_svd"), stack, np.asarray(root), density, "total")
        bound = reference.tolerance(np.float64, 1000) * np.linalg.norm(want)
        assert reference.excess(mine, want, bound) <= 1
        assert reference.excess(stack[0], want, bound) > 1
    again = lj.combine(adapters, weights, method, **{**options, "key": jax.random.fold_in(key, 1)})
    assert not np.array_equal(values(again)[0], got[0])


def test_every_method_makes_an_adapter_of_its_own(keys):
    """Finite, of the parameters of all, and none like another."""
    adapters, weights = [adapter_of(i, 3, 2.0 + i, ["q.kernel"]) for i in range(2)], [0.5, 1.5]
    found = {}
    for method in METHODS:
        options = {} if method in ("cat", "svd", "linear") else {"density": 0.5}
        options |= {"key": keys()} if "dare" in method else {}
        found[method] = changes(lj.combine(adapters, weights, method, **options))["q.kernel"]
    assert len(found) == 11 and all(np.isfinite(change).all() for change in found.values())
    for one, other in itertools.combinations(found, 2):
        assert np.linalg.norm(found[one] - found[other]) > 0.05 * np.linalg.norm(found[one]), (one, other)


def test_density_of_one_prunes_nothing(keys):
    adapters, weights = [adapter_of(i, 3, 2.0, SOME) for i in range(2)], [0.5, 1.5]
    want = changes(lj.combine(adapters, weights, "linear"))
    assert worst(changes(lj.combine(adapters, weights, "magnitude_prune", density=1.0)), want) <= 1
    assert worst(changes(lj.combine(adapters, weights, "dare_linear", density=1.0, key=keys())), want) <= 1


def test_clamp():
    adapters, weights = [adapter_of(i, 3, 2.0, SOME) for i in range(2)], [0.5, 1.5]
    clipped = 0
    free, bound = (lj.combine(adapters, weights, "svd", clamp=c) for c in (None, 0.8))
    for site in free.sites:
        pair = [np.asarray(x) for x in free.factors(site)]
        layers = pair if site.name == "stack.kernel" else [x[None] for x in pair]
        for i in range(len(layers[0])):
            at = np.quantile(np.concatenate([x[i].ravel() for x in layers]), 0.8)
            for x, mine in zip(layers, bound.factors(site), strict=True):
                got = np.asarray(mine).reshape(x.shape)[i]
                np.testing.assert_allclose(got, np.clip(x[i], -at, at), rtol=reference.tolerance(np.float64, 100))
                clipped += np.sum(got != x[i])
    assert clipped


def test_weights_may_be_traced():
    """So that they can be learned (LoraHub), also where the SVD is not differentiated."""
    adapters = [adapter_of(i, 2, 3.0, SOME) for i in range(2)]
    target = adapter_of(9, 2, 3.0, SOME)["q"][LORA_A]["kernel"]

    def loss(w):
        return ((lj.combine(adapters, w, "cat")["q"][LORA_A]["kernel"][:, :2] - target) ** 2).sum()

    w = jax.numpy.asarray([0.3, 0.6])
    slope = jax.jit(jax.grad(loss))(w)
    step = jax.numpy.asarray([1e-6, 0.0])
    assert abs((loss(w + step) - loss(w - step)) / 2e-6 - slope[0]) <= 1e-6 * abs(slope[0]) and slope[1] == 0


def test_dtypes_are_kept():
    half = adapter_of(1, names=["q.kernel"], dtype=jax.numpy.bfloat16)
    for method in ("svd", "linear"):
        leaves = jax.tree.leaves(lj.combine([half, half], [0.5, 0.5], method))
        assert {leaf.dtype for leaf in leaves} == {jax.numpy.dtype("bfloat16")}


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [1.0, float("nan")]}, r"`weights\[1\]=nan`"),
        ({"method": "tie"}, "use one of ties"),
        ({"method": "ties"}, r"needs `density` in \(0, 1\], got None"),
        ({"method": "dare_linear", "density": 0.0}, "got 0.0; draws by chance and needs a `key`"),
        ({"method": "cat", "density": 0.5}, "prunes nothing"),
        ({"method": "cat", "rank": 2}, "has no SVD"),
        ({"method": "svd", "rank": 0}, "must be a positive whole number"),
        ({"method": "svd", "clamp": 2.0}, "is a quantile"),
        ({"method": "ties", "density": 0.5, "majority_sign": "mean"}, "none of total, frequency"),
        ({"method": "svd", "key": 0}, "draws nothing"),
        ({"adapters": []}, "nothing to combine"),
        ({"method": "linear"}, r"`q.kernel` has rank 3 in `adapters\[0\]` and 2 in `adapters\[1\]`"),
        ({"method": "ties", "density": 0.5}, "`resize` them first"),
    ],
)
def test_bad_arguments(arguments, says):
    adapters = [adapter_of(0, 3, names=SOME), adapter_of(1, 2, names=SOME)]
    with pytest.raises(ValueError, match=says):
        lj.combine(**{"adapters": adapters, "weights": [1.0] * len(arguments.get("adapters", adapters)), **arguments})


def test_what_is_no_sum_of_products_is_refused():
    one = adapter_of(0, names=SOME)
    with pytest.raises(TypeError, match="is a dict, not an Adapter"):
        lj.combine([one, one.to_dict()], [1.0, 1.0])
    full = lj.Site(("head", "kernel"), (3, 2), "float64", "full")
    saved = lj.Adapter.from_leaves({("head", "kernel"): np.ones((3, 2))}, (full,))
    with pytest.raises(ValueError, match=r"`adapters\[1\]`: `head.kernel` is trained in full"):
        lj.combine([one, saved], [1.0, 1.0])
    turned = lj.Site(("q", "kernel"), (7, 5), "float64", "linear", site_of("q.kernel", 1, 1.0).atoms, "oi", 3, 4.0)
    leaves = {turned.leaf_path("lora_A"): np.ones((5, 3)), turned.leaf_path("lora_B"): np.ones((3, 7))}
    with pytest.raises(ValueError, match=r"roles 'io' in `adapters\[0\]` and \(7, 5\) with 'oi'"):
        lj.combine([one, lj.Adapter.from_leaves(leaves, (turned,))], [1.0, 1.0])
