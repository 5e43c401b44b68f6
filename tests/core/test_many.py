"""One batch over several adapters equals each part run alone: outputs, gradients, every kind of use, both ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax import reference
from tests.core.harness import cast, config, normal, random_adapter

PARAMS = {
    "table": {"embedding": normal(9, 6)},
    "heads": {"kernel": normal(6, 2, 3)},
    "out": {"kernel": normal(2, 3, 6)},
    "conv": {"kernel": normal(3, 6, 6)},
    "layers": {"kernel": normal(2, 6, 6)},
    "experts": {"kernel": normal(3, 6, 6)},
    "norm": {"scale": normal(6)},
}
IDS = ["b", "__base__", "a", "b", "c", "a"]
TOKENS = np.random.default_rng(0).integers(0, 9, (6, 4))


def model(p, tokens):
    """A lookup, heads, a convolution, a scan over stacked layers with remat, grouped experts and the tied head."""
    x = p["table"]["embedding"][tokens]
    y = jnp.einsum("bsd,dnh->bsnh", x, p["heads"]["kernel"])
    x = x + jnp.einsum("bsnh,nhd->bsd", y, p["out"]["kernel"])
    x = lax.conv_general_dilated(x, p["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    @jax.checkpoint
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    x = lax.scan(layer, x, p["layers"]["kernel"])[0]
    flat = x.reshape(-1, 6)
    sizes = jnp.array([1, 0, flat.shape[0] - 1])
    x = x + lax.ragged_dot(flat, p["experts"]["kernel"], sizes).reshape(x.shape)
    return (x * p["norm"]["scale"]) @ p["table"]["embedding"].T


def setup(ranks=(3, 1, 2), **changes):
    """A bank of three adapters of different ranks and scales in five slots, and the adapters themselves."""
    params = cast(PARAMS, np.float64)
    plan = lj.plan(model, params, TOKENS, config=config(dtype="float64", **changes))
    adapters = {}
    bank = lj.AdapterBank.create(plan.sites, 5, rank=3, dtype="float64")
    for seed, (name, rank) in enumerate(zip("abc", ranks, strict=True)):
        own = lj.plan(model, params, TOKENS, config=config(rank=rank, alpha=3.0 + seed, dtype="float64", **changes))
        adapters[name] = random_adapter(own, np.float64, seed)
        bank = bank.add(name, adapters[name])
    return params, plan, bank, adapters


def alone(fn, plan, params, adapters, names, *batches, **kwargs):
    """Each part by itself, at merged parameters or the base's."""
    merged = {name: lj.merge(params, adapter) for name, adapter in adapters.items()} | {"__base__": params}
    run = jax.jit(fn)
    return [run(merged[name], *parts) for name, *parts in zip(names, *batches, strict=True)]


def bound(want, terms=1 << 12):
    return reference.tolerance(np.float64, terms) * np.abs(want).max()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("selection", ["gathered", "masked"])
def test_every_row_as_if_alone(selection):
    params, plan, bank, adapters = setup()
    assert len(plan.sites) == 6
    many = jax.jit(lj.apply_many(model, plan, selection=selection))
    got = many(params, bank.stack, bank.ids(IDS), TOKENS)
    want = np.concatenate(alone(model, plan, params, adapters, IDS, TOKENS[:, None]))
    assert reference.excess(got, want, bound(want)) <= 1
    for wrong in (["b"] * 6, ["a", *IDS[1:]], ["__base__", *IDS[1:]]):
        assert reference.excess(many(params, bank.stack, bank.ids(wrong), TOKENS), want, bound(want)) > 1e3
    rescaled = bank.rescale("b", 0.9)
    assert reference.excess(many(params, rescaled.stack, bank.ids(IDS), TOKENS), want, bound(want)) > 1e3
    assert many._cache_size() == 1


def test_several_adapters_train_at_once():
    """Each part has a loss of its own, and the gradient of their sum gives every slot that of its own parts alone."""
    params, plan, bank, adapters = setup(ranks=(3, 3, 3))
    names, tokens = ["c", "a", "c"], TOKENS  # two rows each
    weight = normal(2, 4, 9)

    def loss(p, tokens):
        return (model(p, tokens) * weight).sum()

    many = lj.apply_many(loss, plan)

    def total(factors):
        losses = many(params, bank.stack.with_factors(factors), bank.ids(names), tokens)
        return losses.sum(), losses

    grads, losses = jax.jit(jax.grad(total, has_aux=True))(bank.stack.factors)
    parts = tokens.reshape(3, 2, 4)
    want = np.asarray(alone(loss, plan, params, adapters, names, parts))
    assert losses.shape == (3,) and reference.excess(losses, want, bound(want)) <= 1
    got = bank.with_factors(grads)

    def single(adapter, *parts):
        return sum(lj.apply(loss, plan)(params, adapter, part) for part in parts)

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(got.get("b")))
    for name, own in (("a", parts[1:2]), ("c", parts[::2])):
        wanted = jax.jit(jax.grad(single))(adapters[name], *own)
        for y, w in zip(jax.tree.leaves(got.get(name)), jax.tree.leaves(wanted), strict=True):
            assert reference.excess(y, np.asarray(w), bound(w)) <= 1
            assert reference.excess(2 * y, np.asarray(w), bound(w)) > 1


def test_adapters_come_and_go_without_compiling():
    params, plan, bank, adapters = setup()
    many = jax.jit(lj.apply_many(model, plan))
    want = {name: alone(model, plan, params, adapters, [name], TOKENS[None, :1])[0] for name in "abc"}

    def run(bank, name):
        return many(params, bank.stack, bank.ids([name]), TOKENS[:1])

    smaller = bank.remove("b")
    again = smaller.add("new", adapters["c"]).add("b", adapters["b"])
    for a_bank, name, same_as in ((bank, "b", "b"), (again, "new", "c"), (again, "b", "b"), (again, "a", "a")):
        assert reference.excess(run(a_bank, name), want[same_as], bound(want[same_as])) <= 1
    swapped = again.replace("a", adapters["c"]).rename("a", "z")
    assert reference.excess(run(swapped, "z"), want["c"], bound(want["c"])) <= 1
    base = model(params, TOKENS[:1])
    slot = bank.slot("b")
    gone = many(params, smaller.stack, np.array([slot], np.int32), TOKENS[:1])
    assert (
        reference.excess(gone, np.asarray(base), bound(base)) <= 1 < reference.excess(run(bank, "b"), base, bound(base))
    )
    assert many._cache_size() == 1
    assert sorted(smaller) == ["a", "c"] and "b" not in smaller and len(bank) == 3


@pytest.mark.parametrize("selection", ["gathered", "masked"])
def test_an_adapter_that_diverged_is_nobody_elses_trouble(selection):
    """Zero times NaN is NaN: a slot that is not chosen, or free again, must not be multiplied by zero alone."""
    params, plan, bank, adapters = setup(target_modules=["heads", "table"])
    many = jax.jit(lj.apply_many(model, plan, selection=selection))
    names = ["b", "__base__", "b"]
    want = many(params, bank.stack, bank.ids(names), TOKENS[:3])
    broken = jax.tree.map(lambda leaf: leaf.at[..., 0].set(np.nan), adapters["a"])
    with pytest.raises(ValueError, match=r"'a' holds numbers that are not finite \(heads/lora_A/kernel, "):
        bank.replace("a", broken)
    # As training may leave them.
    after = bank.with_factors(jax.tree.map(jnp.multiply, bank.stack.factors, nan_in_slot(bank, "a")))
    assert np.isnan(many(params, after.stack, after.ids(["a"] * 3), TOKENS[:3])).all()
    freed = after.remove("a")
    np.testing.assert_array_equal(many(params, freed.stack, freed.ids(names), TOKENS[:3]), want)
    if selection == "gathered":
        np.testing.assert_array_equal(many(params, after.stack, after.ids(names), TOKENS[:3]), want)


def nan_in_slot(bank, name):
    """A tree like the factors: NaN in one slot and ones in the others."""

    def one(leaf, axis):
        shape = [1] * leaf.ndim
        shape[axis] = bank.stack.slots
        return np.where(np.arange(bank.stack.slots) == bank.slot(name), np.nan, 1.0).reshape(shape)

    return jax.tree.map(one, bank.stack.factors, bank.stack.slot_axes())


def test_what_goes_in_comes_out():
    _, _, bank, adapters = setup()
    for name, adapter in adapters.items():
        got = bank.get(name)
        assert got.sites == adapter.sites
        for y, w in zip(jax.tree.leaves(got), jax.tree.leaves(adapter), strict=True):
            np.testing.assert_array_equal(y, w)
    assert bank.rescale("a", 0.5).get("a").sites[0].alpha == adapters["a"].sites[0].alpha / 2


def test_an_adapter_of_fewer_parameters_leaves_the_others_to_the_base():
    params, plan, bank, adapters = setup()
    part = lj.without(adapters["a"], ["layers", "table"])
    bank = bank.replace("b", part)  # over what stood there before
    many = jax.jit(lj.apply_many(model, plan))
    got = many(params, bank.stack, bank.ids(["b"]), TOKENS[:1])
    want = alone(model, plan, params, {"b": part}, ["b"], TOKENS[None, :1])[0]
    assert reference.excess(got, want, bound(want)) <= 1
    whole = many(params, bank.stack, bank.ids(["a"]), TOKENS[:1])
    assert reference.excess(whole, want, bound(want)) > 1


def test_saved_modules_are_chosen_too():
    """A slot with a copy of the norm, one with another, one without."""
    params = cast(PARAMS, np.float64)
    options = config(dtype="float64", target_modules=["heads"], modules_to_save=["norm"])
    plan = lj.plan(model, params, TOKENS, config=options)
    start = plan.init(jax.random.key(0), params)
    adapters = {name: jax.tree.map(lambda leaf, i=i: leaf + i, start) for i, name in enumerate("abc")}
    adapters["c"] = lj.without(adapters["c"], ["norm"])
    bank = lj.AdapterBank.create(plan.sites, 4, dtype="float64")
    for name, adapter in adapters.items():
        bank = bank.add(name, adapter)
    got = jax.jit(lj.apply_many(model, plan))(params, bank.stack, bank.ids(IDS), TOKENS)
    want = np.concatenate(alone(model, plan, params, adapters, IDS, TOKENS[:, None]))
    assert reference.excess(got, want, bound(want)) <= 1
    base = alone(model, plan, params, dict.fromkeys("abc", lj.without(adapters["b"], ["norm"])), IDS, TOKENS[:, None])
    assert reference.excess(got, np.concatenate(base), bound(want)) > 1


def test_dropout_is_that_of_a_part_alone(keys):
    params, plan, bank, adapters = setup(dropout=0.5, target_modules=["heads", "layers"])
    key = keys()
    many = jax.jit(lj.apply_many(model, plan))
    got = many(params, bank.stack, bank.ids(IDS[2:4]), TOKENS[:2], key=key)
    for i, name in enumerate(IDS[2:4]):
        own = lj.plan(
            model, params, TOKENS, config=config(rank=adapters[name].sites[0].rank, dropout=0.5, dtype="float64",
            target_modules=["heads", "layers"]),
        )  # fmt: skip
        run = jax.jit(lj.apply(model, own))
        want = run(params, adapters[name], TOKENS[i : i + 1], key=jax.random.fold_in(key, i))
        other = run(params, adapters[name], TOKENS[i : i + 1], key=key)
        assert reference.excess(got[i : i + 1], np.asarray(want), bound(want)) <= 1
        assert reference.excess(got[i : i + 1], np.asarray(other), bound(want)) > 1


def test_axes():
    """A batch on another axis, what is shared, and results without a batch."""

    def fn(p, x, mask, shift=0.0):
        y = jnp.einsum("sbd,de->seb", x, p["w"]["kernel"]) * mask[:, None, None] + shift
        return y, mask.sum(), y.sum()

    params, x = cast(({"w": {"kernel": normal(5, 4)}}, normal(3, 4, 5)), np.float64)
    mask = np.array([1.0, 0.0, 2.0])
    plan = lj.plan(fn, params, x, mask, config=config(dtype="float64"))
    adapter = random_adapter(plan, np.float64)
    bank = lj.AdapterBank.create(plan.sites, 2, dtype="float64").add("a", adapter)
    many = lj.apply_many(fn, plan)
    ids = bank.ids(["a", "__base__"])
    got, shared, sums = many(params, bank.stack, ids, x, mask, in_axes=(1, None), out_axes=(2, None, 0), shift=1.0)
    merged = lj.merge(params, adapter)
    want = np.concatenate([fn(p, x[:, i : i + 2], mask, 1.0)[0] for p, i in ((merged, 0), (params, 2))], 2)
    assert reference.excess(got, want, bound(want)) <= 1 and shared == 3 and sums.shape == (2,)
    np.testing.assert_allclose(sums, [want[..., :2].sum(), want[..., 2:].sum()], rtol=1e-12)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 5\) cannot be cut into 2 equal parts along axis 0"):
        many(params, bank.stack, ids, x, mask)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda b, a: b.add("a", a), "an adapter 'a' already"),
        (lambda b, a: b.add("__base__", a), "cannot name an adapter"),
        (lambda b, a: b.add("d", a).add("e", a).add("f", a), "all 5 slots are taken"),
        (lambda b, a: b.add("d", lj.resize(a, 4)), "`conv.kernel` has rank 4, and a slot has room for 3"),
        (lambda b, a: b.add("d", lj.rename(a, {"heads": "q"})), "`q.kernel` is not in the bank"),
        (lambda b, a: b.ids(["a", "bb"]), "no adapter 'bb' in the bank; there is b"),
        (lambda b, a: b.rename("a", "b"), "'b' is taken already"),
        (lambda b, a: lj.AdapterBank.create(b.stack.sites, 0), "must be a positive whole number"),
        (lambda b, a: lj.AdapterBank.create(b.stack.sites, 1, rank=0), "`rank=0` must be a positive whole number"),
    ],
)
def test_bad_calls(call, says):
    _, _, bank, adapters = setup()
    with pytest.raises(ValueError, match=says):
        call(bank, adapters["a"])


def test_what_does_not_fit_is_refused():
    params, plan, bank, _ = setup()
    other = lj.plan(model, params, TOKENS, config=config(target_modules=["heads"]))
    many = lj.apply_many(model, other)
    with pytest.raises(ValueError, match="the bank is not one for this plan: they differ in conv.kernel"):
        many(params, bank.stack, bank.ids(IDS), TOKENS)
    many = lj.apply_many(model, plan)
    with pytest.raises(TypeError, match="got AdapterBank; pass `bank.stack`"):
        many(params, bank, bank.ids(IDS), TOKENS)
    with pytest.raises(ValueError, match=r"must be \(n,\) integers, got float64"):
        many(params, bank.stack, np.ones(6), TOKENS)
    with pytest.raises(ValueError, match="`ids` names slot 5, and the stack has slots 0 to 4"):
        many(params, bank.stack, [5] * 6, TOKENS)
    with pytest.raises(TypeError, match=r"write \['abc'\]"):
        bank.ids("abc")
    with pytest.raises(TypeError, match="`sites` is a Plan: write `AdapterBank.create"):
        lj.AdapterBank.create(plan, 2)
    with pytest.raises(TypeError, match="`dtype=int32` cannot hold factors"):
        lj.AdapterBank.create(plan.sites, 2, dtype="int32")
    with pytest.raises(ValueError, match="`selection='sorted'` is none of"):
        lj.apply_many(model, plan, selection="sorted")
    dora = lj.plan(model, params, TOKENS, config=config(target_modules=["heads"], use_dora=True))
    with pytest.raises(ValueError, match=r"a bank cannot hold: `heads.kernel` has heads/lora_magnitude_vector/kernel"):
        lj.AdapterBank.create(dora.sites, 2)


@pytest.mark.parametrize("name, what", [("conv", "a convolution"), ("experts", "a grouped product")])
def test_what_has_no_kernels_is_refused_by_name(name, what):
    params, plan, bank, _ = setup(target_modules=[name])
    with pytest.raises(ValueError, match=f"can't run `{name}.kernel`: {what}"):
        lj.apply_many(model, plan, selection="fused")(params, bank.stack, bank.ids(IDS), TOKENS)


def test_explicit_axes_of_a_mesh_are_refused():
    params, plan, bank, _ = setup(target_modules=["heads"])
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.device_put(TOKENS, jax.NamedSharding(mesh, jax.P("d")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"shape \(6, 4\) is split over explicit axes of a mesh"):
        lj.apply_many(model, plan)(params, bank.stack, bank.ids(IDS), split)
