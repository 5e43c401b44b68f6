"""Combining and counting as PEFT does it, on a torch model with its adapters and on the same factors here."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jax.numpy as jnp  # noqa: E402

import lora_jax as lj  # noqa: E402
from lora_jax import reference  # noqa: E402
from lora_jax.sites import Atom  # noqa: E402

NAMES = ("lin", "conv", "emb")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(10, 8)
        self.lin = torch.nn.Linear(8, 6)
        self.conv = torch.nn.Conv2d(3, 4, (2, 3))
        self.score = torch.nn.Linear(6, 2)


def torch_model(ranks, alphas, rslora=False):
    """Two adapters with random factors; the second leaves the convolution alone."""
    torch.manual_seed(0)
    model = None
    for name, rank, alpha, targets in zip(("one", "two"), ranks, alphas, (NAMES, ("lin", "emb")), strict=True):
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(targets), use_rslora=rslora, init_lora_weights=False
        )
        if model is None:
            model = peft.get_peft_model(Model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


def ours(model, name):
    """The same factors as an adapter, weights named and stored as torch has them."""
    sites, leaves = [], {}
    for module in NAMES:
        layer = getattr(model.base_model.model, module)
        embedding = module == "emb"
        pair = (
            (layer.lora_embedding_A, layer.lora_embedding_B) if embedding else (layer.lora_A, layer.lora_B)
        )  # fmt: skip
        if name not in pair[0]:
            continue
        a, b = (p[name] if embedding else p[name].weight for p in pair)
        a, b = (x.detach().numpy() for x in (a, b))
        shape = tuple(layer.weight.shape)
        roles = {"lin": "oi", "conv": "oiii", "emb": "io"}[module]
        config = model.peft_config[name]
        site = lj.Site(
            (module, "weight"), shape, "float32", "linear", tuple(Atom(d, 1, n) for d, n in enumerate(shape)),
            roles, config.r, config.lora_alpha, config.use_rslora,
        )  # fmt: skip
        sites.append(site)
        leaves[site.leaf_path("lora_A")] = jnp.asarray(np.moveaxis(a, 0, -1))
        leaves[site.leaf_path("lora_B")] = jnp.asarray(b.reshape(b.shape[:2]).T)
    return lj.Adapter.from_leaves(leaves, tuple(sites))


def excess(adapter, model, name):
    """The worst error of the adapter's changes against those of PEFT's adapter `name`, over its bound."""
    found = []
    for site in adapter.sites:
        want = getattr(model.base_model.model, site.path[0]).get_delta_weight(name).detach().numpy()
        got = reference.delta(site, *adapter.factors(site))
        bound = reference.tolerance("float32", 64) * np.linalg.norm(want)
        found.append(reference.excess(got, want.astype(np.float64), bound))
    assert len(found) == len(NAMES)
    return max(found)


METHODS = ["cat", "svd", "linear", "magnitude_prune", "ties", "magnitude_prune_svd", "ties_svd"]


@pytest.mark.parametrize("method", METHODS)
def test_combine_agrees_with_add_weighted_adapter(method):
    ranks = (4, 4) if method in ("linear", "magnitude_prune", "ties") else (4, 3)
    model = torch_model(ranks, alphas=(8, 2))
    pair, weights = [ours(model, name) for name in ("one", "two")], [0.7, -1.3]
    density = {} if method in ("cat", "svd", "linear") else {"density": 0.6}
    sign = {"majority_sign": "frequency"} if "ties" in method else {}
    theirs = {"majority_sign_method": "frequency"} if sign else {}
    model.add_weighted_adapter(["one", "two"], weights, "both", combination_type=method, **density, **theirs)
    rank = {"rank": 4} if "svd" in method else {}
    got = lj.combine(pair, weights, method, **density, **sign, **rank)
    assert excess(got, model, "both") <= 1
    assert excess(lj.combine(pair, [0.7, 1.3], method, **density, **sign, **rank), model, "both") > 1


def test_rslora_is_scaled_once():
    """PEFT keeps `use_rslora` for the combined adapter, whose scale is in its factors already."""
    model = torch_model((4, 4), (8, 2), rslora=True)
    pair, weights = [ours(model, name) for name in ("one", "two")], [0.7, -1.3]
    got = lj.combine(pair, weights, "cat")
    want = sum(w * reference.delta(a.sites[0], *a.factors(a.sites[0])) for w, a in zip(weights, pair, strict=True))
    mine = reference.delta(got.sites[0], *got.factors(got.sites[0]))
    assert reference.excess(mine, want, reference.tolerance("float32", 64) * np.linalg.norm(want)) <= 1
    model.add_weighted_adapter(["one", "two"], weights, "both", combination_type="cat")
    theirs = model.base_model.model.lin.get_delta_weight("both").detach().numpy()
    assert np.linalg.norm(theirs) > 2 * np.linalg.norm(want)


def test_rows_of_the_status_are_those_of_peft():
    model = torch_model((4, 3), (8, 2))
    pair = {name: ours(model, name) for name in ("one", "two")}
    model.set_adapter("two")
    params = {name: jnp.zeros(p.shape) for name, p in Model().named_parameters()}
    theirs = {row.name.rpartition(".")[2]: row for row in model.get_layer_status()}
    mine = {row.name.partition(".")[0]: row for row in lj.layer_status(pair, active=["two"])}
    assert theirs.keys() == mine.keys() == set(NAMES)
    for name, row in theirs.items():
        got = mine[name]
        assert list(got.active_adapters) == row.active_adapters and list(got.merged_adapters) == row.merged_adapters
        assert got.requires_grad == row.requires_grad and list(got.available_adapters) == row.available_adapters
        assert got.enabled == row.enabled
        assert {k: list(v) for k, v in got.devices.items()} == row.devices
    whole, status = model.get_model_status(), lj.model_status(params, pair, active=["two"])
    fields = ("adapter_model_type", "peft_types", "trainable_params", "total_params", "num_adapter_layers", "enabled")
    for field in fields:
        assert getattr(status, field) == getattr(whole, field), field
    assert status.requires_grad == whole.requires_grad == {"one": False, "two": True}


@pytest.mark.parametrize("saved", [None, ["score"]])
def test_the_line_of_trainable_parameters(saved):
    """Word for word; a copy of `modules_to_save` is counted beside the original."""
    config = peft.LoraConfig(r=4, target_modules=["lin"], modules_to_save=saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Model(), config)
    params = {"lin": {"kernel": jnp.zeros((8, 6))}, "score": {"kernel": jnp.zeros((6, 2)), "bias": jnp.zeros(2)}}
    rest = {"emb": jnp.zeros((10, 8)), "conv": jnp.zeros((4, 3, 2, 3)), "b": jnp.zeros(4), "lin_b": jnp.zeros(6)}

    def fn(p, x):
        return x @ p["lin"]["kernel"] @ p["score"]["kernel"] + p["score"]["bias"] + p["rest"]["b"][:2]

    params["rest"] = rest
    ours_config = lj.LoRAConfig(rank=4, target_modules=["lin"], modules_to_save=saved or ())
    plan = lj.plan(fn, params, jnp.zeros((1, 8)), config=ours_config)
    import jax

    adapter = plan.init(jax.random.key(0), params)
    printed = []
    for call in (model.print_trainable_parameters, lambda: lj.print_trainable_parameters(params, adapter)):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            call()
        printed.append(out.getvalue())
    assert printed[0] == printed[1] == plan.summary() + "\n"
