"""PEFT's own initialisers and ours on the same weights and data; and what they make, exchanged with real PEFT."""

import copy
import dataclasses
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import lora_jax as lj  # noqa: E402
from lora_jax import inits, reference  # noqa: E402
from lora_torch import load_peft, plan_peft, save_peft  # noqa: E402
from tests.core.harness import normal  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of its own deprecations

# Of one shape, so that each decomposition is compiled once.
SHAPES = {"first": (10, 10), "second": (10, 10), "third": (10, 10)}
# Four directions of equal weight, so that they are worth more ranks than later layers' inputs are.
BATCHES = [normal(40, 10, seed=n) * np.float32([1] * 4 + [0.3] * 6) + 1 for n in range(2)]
RANK, ALPHA = 3, 5.0


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (i, o) in SHAPES.items():
            setattr(self, name, torch.nn.Linear(i, o, bias=False))

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def fn(p, x):
    h = jnp.tanh(x @ p["first"]["kernel"])
    return jnp.tanh(h @ p["second"]["kernel"]) @ p["third"]["kernel"]


def params():
    return {name: {"kernel": normal(*shape, seed=n) / 3} for n, (name, shape) in enumerate(SHAPES.items())}


def twin(tree=None):
    model = Mlp()
    model.load_state_dict(
        {f"{n}.weight": torch.tensor(np.asarray(w["kernel"]).T) for n, w in (tree or params()).items()}
    )
    return model


def planned(**settings):
    config = lj.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=[*SHAPES], **settings)
    return lj.plan(fn, params(), BATCHES[0], config=config)


def config(**settings):
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[*SHAPES], **settings)


def theirs(model, name):
    """PEFT's base and its change, as kernels."""
    layer = getattr(model.base_model.model, name)
    return (x.detach().numpy().T for x in (layer.base_layer.weight, layer.get_delta_weight("default")))


def train_step(model):
    for x in BATCHES:
        (model(torch.tensor(x)) ** 2).sum().backward()


def loss(p, x):
    return (fn(p, x) ** 2).sum()


def by_corda(method):
    def run(model):
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        settings = config(init_lora_weights="corda", corda_config=CordaConfig(corda_method=method))
        preprocess_corda(model, settings, run_model=lambda: model(torch.tensor(BATCHES[0][None])))
        return settings

    return run


def by_lora_ga(**settings):
    def run(model):
        from peft.tuners.lora.config import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        out = config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**settings))
        preprocess_loraga(model, out, lambda: train_step(model))
        return out

    return run


CASES = {
    "pissa": (lambda model: config(init_lora_weights="pissa"), inits.pissa),
    # PEFT draws no more vectors than the rank, and needs many iterations.
    "pissa_niter_300": (
        lambda model: config(init_lora_weights="pissa_niter_300"),
        lambda plan, p: inits.pissa(plan, p, iterations=20),
    ),
    "olora": (lambda model: config(init_lora_weights="olora"), inits.olora),
    "corda ipm": (by_corda("ipm"), lambda plan, p: inits.corda(plan, fn, p, BATCHES[:1])),
    "corda kpm": (by_corda("kpm"), lambda plan, p: inits.corda(plan, fn, p, BATCHES[:1], method="kpm")),
    "lora_ga": (by_lora_ga(), lambda plan, p: inits.lora_ga(plan, loss, p, BATCHES)),
    "lora_ga weight_svd": (
        by_lora_ga(direction="A2rBr", scale="weight_svd"),
        lambda plan, p: inits.lora_ga(plan, loss, p, BATCHES, direction="A2rBr", scale="weight_svd"),
    ),
    "lora_ga gd_scale": (
        by_lora_ga(direction="ArBr", scale="gd_scale"),
        lambda plan, p: inits.lora_ga(plan, loss, p, BATCHES, direction="ArBr", scale="gd_scale"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_change_as_peft(case, monkeypatch):
    # PEFT's CorDA takes its `dataclass` from attrs, on which PEFT does not depend.
    monkeypatch.setitem(sys.modules, "attr", dataclasses)
    prepare, method = CASES[case]
    model = twin()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = prepare(model)
        model = peft.get_peft_model(model, settings)
    plan = planned()
    adapter, new_params = method(plan, params())
    for site in plan.sites:
        name = site.path[0]
        base, change = theirs(model, name)
        got = reference.delta(site, *adapter.factors(site))
        if "lora_ga" in case:  # vectors that are paired with others have no sign of their own: compare by column
            layer = getattr(model.base_model.model, name)
            pairs = zip(adapter.factors(site), (layer.lora_A, layer.lora_B), strict=True)
            for ours, its in pairs:
                want = np.abs(its["default"].weight.detach().numpy().T)
                # PEFT takes the weight's norm from four power iterations.
                tolerance = 1e-2 if "weight_svd" in case else 1e-3
                np.testing.assert_allclose(np.abs(ours), want, atol=tolerance * want.max())
        else:
            # CorDA inverts a covariance in float32.
            tolerance = 1e-2 if "corda" in case else 1e-4 if "niter" in case else 1e-5
            np.testing.assert_allclose(got, change, atol=tolerance * np.abs(change).max())
            np.testing.assert_allclose(new_params[name]["kernel"], base, atol=tolerance * np.abs(change).max())
        assert np.abs(got).max() > 10 * np.abs(base + change - params()[name]["kernel"]).max()


def test_eva_as_peft():
    from peft.tuners.lora import EvaConfig
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    settings = config(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    settings.eva_config.tau = -1.0  # settled at once: PEFT stops after two batches
    model = peft.get_peft_model(twin(), settings)
    initialize_lora_eva_weights(
        model, [torch.tensor(x) for x in BATCHES], forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    adapter = inits.eva(planned(), fn, params(), BATCHES)
    ranks = {}
    for site in adapter.sites:
        layer = getattr(model.base_model.model, site.path[0])
        want = layer.lora_A["default"].weight.detach().numpy()
        ranks[site.path[0]] = site.rank
        assert want.shape[0] == site.rank and layer.scaling["default"] == pytest.approx(site.scale)
        a = np.asarray(adapter.factors(site)[0]).T
        np.testing.assert_allclose(np.abs((a * want).sum(1)), 1, atol=1e-3)
    assert len(set(ranks.values())) > 1, "nothing was redistributed"


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(BATCHES[0])).numpy()


def trained(adapter):
    leaves = {
        site.leaf_path(f): adapter.leaf(site.leaf_path(f))
        + 0.2 * normal(*adapter.leaf(site.leaf_path(f)).shape, seed=n)
        for n, site in enumerate(adapter.sites)
        for f in ("lora_A", "lora_B")
    }
    return lj.Adapter.from_leaves(leaves, adapter.sites)


METHODS = {
    "pissa": inits.pissa,
    "olora": inits.olora,
    "corda": lambda plan, p: inits.corda(plan, fn, p, BATCHES),
    "lora_ga": lambda plan, p: inits.lora_ga(plan, loss, p, BATCHES),
    "loftq": inits.loftq,
}


@pytest.mark.parametrize("method", METHODS)
def test_export_with_the_new_base_or_converted(method, tmp_path):
    plan = planned()
    initial, new_params = METHODS[method](plan, params())
    adapter = trained(initial)
    want = np.asarray(lj.apply(fn, plan)(new_params, adapter, BATCHES[0]))

    def error(tree, directory):
        return np.abs(logits(peft.PeftModel.from_pretrained(twin(tree), directory)) - want).max() / np.abs(want).max()

    beside = save_peft(adapter, tmp_path / "beside", plan)
    assert error(new_params, beside) < 1e-5
    assert error(params(), beside) > 1e-3  # on the wrong base it is another model
    if method == "loftq":
        with pytest.raises(ValueError, match="quantised"):
            inits.to_original(adapter, initial, params(), new_params)
        return
    plain = inits.to_original(adapter, initial, params(), new_params)
    converted = save_peft(plain, tmp_path / "converted", plan)
    assert error(params(), converted) < 1e-5
    assert error(new_params, converted) > 1e-3


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_conversion_with_rslora_and_patterns(method, tmp_path):
    """Which PEFT refuses to convert: its one alpha cannot be right for every layer. Here each layer has its own."""
    plan = planned(use_rslora=True, rank_pattern={"second": 2}, alpha_pattern={"third": 9.0})
    initial, new_params = METHODS[method](plan, params())
    adapter = trained(initial)
    want = np.asarray(lj.apply(fn, plan)(new_params, adapter, BATCHES[0]))
    plain = inits.to_original(adapter, initial, params(), new_params)
    assert [site.rank for site in plain.sites] == [6, 4, 6]
    model = peft.PeftModel.from_pretrained(twin(), save_peft(plain, tmp_path / "plain", plan))
    assert np.abs(logits(model) - want).max() < 1e-5 * np.abs(want).max()
    model.base_model.model.third.scaling["default"] *= 1.01
    assert np.abs(logits(model) - want).max() > 1e-3 * np.abs(want).max()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_import_of_what_peft_converted(init, tmp_path):
    model = peft.get_peft_model(twin(), config(init_lora_weights=init))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for n, (name, weight) in enumerate(model.named_parameters()):
            if "lora_" in name:
                weight += 0.2 * torch.tensor(normal(*weight.shape, seed=n))
    want = logits(model)
    trained_state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert all(torch.equal(trained_state[k], v) for k, v in model.state_dict().items() if k in trained_state)
    plan = plan_peft(tmp_path / "plain", fn, params(), BATCHES[0])
    adapter = load_peft(tmp_path / "plain", plan)
    got = np.asarray(lj.apply(fn, plan)(params(), adapter, BATCHES[0]))
    assert all(site.rank == 2 * RANK for site in adapter.sites)
    assert (
        np.abs(got - want).max() < 1e-5 * np.abs(want).max() < np.abs(np.asarray(fn(params(), BATCHES[0])) - want).max()
    )
