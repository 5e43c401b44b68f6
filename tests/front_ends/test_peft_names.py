"""The names of PEFT over Flax: the state of a model with several adapters, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax import inits, peft
from tests.core.harness import normal

X = normal(5, 6)
BOTH = ["up", "down"]


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))

    def hidden(self, x):
        return jnp.tanh(self.up(x))


def base():
    return Mlp(nnx.Rngs(0))


def config(**settings):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": BOTH, "init_lora_weights": False, **settings})


def two():
    """A model with adapters "default" and "other", which differ in rank and targets."""
    module = base()
    model = peft.get_peft_model(module, config(), inputs=(X,))
    model.add_adapter("other", config(r=3, target_modules=["up"]))
    return module, model


def by_hand(module, model, scales):
    """The module's outputs with `scales[name]` times the change of each adapter in its kernels."""
    params = {}
    for name in BOTH:
        params[name] = np.asarray(getattr(module, name).kernel[...], np.float64)
    for name, scale in scales.items():
        for site in model.adapter(name).sites:
            a, b = (np.asarray(f, np.float64) for f in model.adapter(name).factors(site))
            params[site.path[0]] = params[site.path[0]] + scale * site.alpha / site.rank * a @ b
    bias = {name: np.asarray(getattr(module, name).bias[...]) for name in BOTH}
    return np.tanh(X @ params["up"] + bias["up"]) @ params["down"] + bias["down"]


def close(got, want):
    return bool(np.abs(np.asarray(got) - want).max() < 1e-5)


def test_active_adapters_add_up():
    module, model = two()
    cases = {"default": {"default": 1}, "other": {"other": 1}}
    for active, scales in cases.items():
        model.set_adapter(active)
        assert model.active_adapter == active and close(model(X), by_hand(module, model, scales))
    model.set_adapter(["default", "other"])
    want = by_hand(module, model, {"default": 1, "other": 1})
    assert close(model(X), want)
    for wrong in ({}, {"default": 1}, {"other": 1}, {"default": 2, "other": 1}):
        assert not close(by_hand(module, model, wrong), want)
    # Methods and parts of the base run adapted.
    assert not np.allclose(model.hidden(X), module.hidden(X), atol=1e-2)
    assert close(model.down(model.hidden(X)), want)
    assert np.array_equal(module(X), base()(X))  # what was passed in is as it was


def test_merging_and_disabling():
    module, model = two()
    plain, adapted = module(X), model(X)
    model.merge_adapter()
    assert model.merged_adapters == ["default"] and close(model(X), adapted)
    with pytest.raises(ValueError, match="'default' is merged"):
        model.delete_adapter("default")
    with pytest.raises(KeyError, match="boom"), model.disable_adapter():
        assert np.array_equal(model(X), plain)
        raise KeyError("boom")
    assert model.merged_adapters == ["default"] and close(model(X), adapted)
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter(["default", "other"])
    assert close(model(X), by_hand(module, model, {"default": 1, "other": 1}))
    assert np.array_equal(model.unload()(X), plain)
    with pytest.warns(UserWarning, match="unmerges default, other"):
        model.set_adapter("other")
    assert model.merged_adapters == [] and close(model(X), by_hand(module, model, {"other": 1}))
    with model.disable_adapter():
        assert np.array_equal(model(X), plain)
    assert close(model.merge_and_unload()(X), by_hand(module, model, {"other": 1}))
    assert close(model.merge_and_unload(adapter_names=["default"])(X), by_hand(module, model, {"default": 1}))
    assert type(model.unload()) is Mlp
    model.merge_adapter()
    model.unmerge_adapter()
    assert np.array_equal(model.base.up.kernel[...], module.up.kernel[...])
    with pytest.warns(UserWarning, match="nothing is merged"):
        model.unmerge_adapter()
    with pytest.raises(TypeError, match=r"write \['default'\]"):
        model.merge_adapter("default")


def test_safe_merge_changes_nothing_that_is_not_finite():
    module, model = two()
    model.lora["default"]["up"]["lora_A"]["kernel"][...] = jnp.full((6, 2), jnp.inf)
    with pytest.raises(ValueError, match=r"not finite in up\.kernel"):
        model.merge_adapter(safe_merge=True)
    assert np.array_equal(model.base.up.kernel[...], module.up.kernel[...]) and not model.merged_adapters


def test_weighted_adapters():
    module, model = two()
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", "cat")
    assert model.active_adapters == ["default"]
    assert not nnx.to_flat_state(nnx.state(model.lora["sum"], nnx.LoRAParam))
    model.set_adapter("sum")
    assert close(model(X), by_hand(module, model, {"default": 0.5, "other": -2}))
    assert model.lora_layers()["up.kernel"].scaling["sum"] == 1
    model.add_weighted_adapter(["default", "other"], [1, 1], "dare", "dare_linear_svd", density=0.5)
    assert model.peft_config["dare"].r == 3
    for arguments, message in [
        ((["default"], [1.0], "sum"), "there is an adapter 'sum'"),
        ((["default", "other"], [1.0], "new"), "2 adapters and 1 weights"),
        ((["default", "other"], [1, 1], "new", "linear"), "rank 2 in .* and 3"),
        ((["default", "none"], [1, 1], "new", "cat"), "no adapter 'none'"),
        ((["default", "other"], [1, 1], "new", "mean"), "`combination_type='mean'`.*ties_svd"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)


def test_a_weighted_adapter_says_what_it_adapts():
    _, model = two()
    model.add_adapter("down", config(target_modules=["down"], exclude_modules=["up"]))
    model.add_weighted_adapter(["down", "other"], [1, 1], "sum", "cat")
    assert model.peft_config["sum"].target_modules == ["down", "up"] and not model.peft_config["sum"].exclude_modules


def test_an_adapter_added_meanwhile_is_for_the_base_and_not_for_what_is_merged():
    """Its magnitudes and copies start from the base that it will run on."""
    module, model = two()
    model.merge_adapter()
    model.add_adapter("new", config(use_dora=True, init_lora_weights=True, target_modules=["up"], bias="all"))
    with pytest.warns(UserWarning, match="unmerges default"):
        model.set_adapter("new")
    assert close(model(X), np.asarray(module(X)))


def test_adapters_come_and_go():
    _, model = two()
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="'other' was active; 'default' is now"):
        model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] == model.active_adapters
    for call in (model.delete_adapter, model.set_adapter, model.adapter):
        with pytest.raises(ValueError, match="there is no adapter 'other'; there are 'default'"):
            call("other")
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        model.add_adapter("default", config())
    model.delete_adapter("default")
    assert np.array_equal(model(X), base()(X)) and model.active_adapters == []


def test_only_active_adapters_train():
    _, model = two()
    before = {name: jax.tree.leaves(model.adapter(name)) for name in ("default", "other")}
    optimizer = nnx.Optimizer(model, optax.adamw(0.1, weight_decay=0.1), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: (m(X) ** 2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]
    moved = {
        name: [not np.array_equal(old, new) for old, new in zip(was, jax.tree.leaves(model.adapter(name)), strict=True)]
        for name, was in before.items()
    }
    assert all(moved["default"]) and not any(moved["other"])
    assert np.array_equal(model.base.up.kernel[...], base().up.kernel[...])
    status = model.get_model_status()
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ("default", "other")
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == model.adapter().count() and total == 92 + trainable + model.adapter("other").count()
    assert {row.name for row in model.get_layer_status()} == {"up.kernel", "down.kernel"}


def test_layers():
    module, model = two()
    layer = model.lora_layers()["up.kernel"]
    assert isinstance(layer, peft.LoraLayer) and layer.r == {"default": 2, "other": 3}
    assert layer.lora_A["other"].shape == (6, 3) and layer.scaling == {"default": 2, "other": pytest.approx(4 / 3)}
    layer.scale_layer(3)
    layer.set_scale("other", 0.5)
    assert layer.scaling == {"default": 6, "other": pytest.approx(2 / 3)}
    assert model.lora_layers()["down.kernel"].scaling == {"default": 2}
    layer.unscale_layer(2)
    assert layer.scaling["default"] == 3
    layer.unscale_layer()
    assert layer.scaling["default"] == 2 and close(model(X), by_hand(module, model, {"default": 1}))
    with pytest.raises(ValueError, match="has no adapter 'none'; it has default, other"):
        layer.get_delta_weight("none")
    with pytest.raises(ValueError, match=r"write `unscale_layer\(\)`"):
        layer.unscale_layer(0)
    for scale in (layer.scale_layer, lambda factor: layer.set_scale("other", factor)):
        with pytest.raises(ValueError, match="`scale=nan` must be a finite number"):
            scale(float("nan"))


@pytest.mark.parametrize("dora", [False, True])
def test_linear(dora):
    layer = peft.Linear(base().up, r=2, lora_alpha=6, init_lora_weights=False, use_dora=dora)
    delta = layer.get_delta_weight("default")
    assert layer.scaling == {"default": 3.0} and not layer.merged
    if not dora:
        assert close(layer(X), np.asarray(base().up(X) + X @ delta))
    want = layer(X)
    layer.merge()
    assert layer.merged and close(layer(X), np.asarray(want))
    layer.unmerge()
    assert np.array_equal(layer.get_base_layer().kernel[...], base().up.kernel[...])
    with pytest.raises(TypeError, match="is a Mlp, not an nnx.Linear"):
        peft.Linear(base())


@pytest.mark.parametrize("init", ["pissa_niter_2", "corda", "lora_ga", "loftq", "eva"])
def test_every_initialiser(init, tmp_path):
    module = base()
    more = {"batches": [X]} if init in ("corda", "eva") else {}
    if init == "lora_ga":
        more = {"batches": [(X, np.ones((5, 4), np.float32))], "loss": lambda m, x, y: ((m(x) - y) ** 2).sum()}
    settings = config(init_lora_weights=init, eva_config={"tau": None})
    model = peft.get_peft_model(module, settings, inputs=(X,), **more)
    changed = not np.array_equal(model.base.up.kernel[...], module.up.kernel[...])
    assert changed == (init != "eva")
    if init == "loftq":
        assert 0 < np.abs(model(X) - module(X)).max() < np.abs(model.unload()(X) - module(X)).max()
        with pytest.raises(ValueError, match="quantised base"):
            model.save_pretrained(tmp_path)
        return
    assert np.allclose(model(X), module(X), atol=1e-4)
    for variable in (v for _, v in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        variable[...] = variable[...] + 0.1
    model.lora_layers()["up.kernel"].set_scale("default", 0.5)  # which the base's loss does not follow
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(module, tmp_path, inputs=(X,))
    assert np.allclose(again(X), model(X), atol=1e-4) and np.abs(again(X) - module(X)).max() > 0.01
    _, plain = two()
    if changed:
        with pytest.raises(ValueError, match="changes the base, on which other adapters rely"):
            plain.add_adapter("more", settings, **more)


# An initialiser's settings under PEFT's names, the same in `lora_jax.inits`, and what else it is given.
MASK = {"mask": lambda x: jnp.arange(5) < 3}
PAIR = {"batches": [(X, np.ones((5, 4), np.float32))], "loss": lambda m, x, y: ((m(x) - y) ** 2).sum()}
SETTINGS = [
    (dict(loftq_config={"loftq_bits": 2, "loftq_iter": 3}), inits.loftq, dict(bits=2, iterations=3), {}),
    (dict(corda_config=peft.CordaConfig("kpm")), inits.corda, dict(method="kpm"), {"batches": [X], **MASK}),
    (
        dict(eva_config=peft.EvaConfig(1.5, None, True, False)),
        inits.eva,
        dict(rho=1.5, whiten=True, adjust_alpha=False),
        {"batches": [X], **MASK},
    ),
    (
        dict(lora_ga_config=peft.LoraGAConfig("A2rBr", "stable", 9)),
        inits.lora_ga,
        dict(direction="A2rBr", stable_gamma=9),
        PAIR,
    ),
]


@pytest.mark.parametrize(("settings", "function", "arguments", "more"), SETTINGS)
def test_settings_reach_their_initialiser(settings, function, arguments, more):
    module = base()
    settings = {"init_lora_weights": function.__name__, **settings}
    model = peft.get_peft_model(module, config(target_modules=["up"], **settings), inputs=(X,), **more)
    graphdef, params = nnx.split(module, nnx.Param)
    plan = lj.plan(
        lambda p, x: nnx.merge(graphdef, p)(x), params, X, config=lj.LoRAConfig(rank=2, alpha=4, target_modules=["up"])
    )

    def ours(**arguments):
        if "loss" in more:
            given = (lambda p, x, y: more["loss"](nnx.merge(graphdef, p), x, y), params, more["batches"])
        else:
            given = (lambda p, x: nnx.merge(graphdef, p)(x), params, more["batches"]) if more else (params,)
        out = function(plan, *given, **arguments)
        adapter = out if isinstance(out, lj.Adapter) else out[0]
        # Up to the signs of singular vectors, which no seed decides.
        (site,) = adapter.sites
        a, b = (np.abs(factor) for factor in adapter.factors(site))
        return site.scale, a, b

    (site,) = model.adapter().sites
    got = (site.scale, *(np.abs(factor) for factor in model.adapter().factors(site)))

    def same(want):
        return all(np.shape(x) == np.shape(y) and np.allclose(x, y, atol=1e-4) for x, y in zip(got, want, strict=True))

    mask = {"mask": more["mask"]} if "mask" in more else {}
    assert same(ours(**arguments, **mask))
    for name in arguments:
        if name not in ("rho", "adjust_alpha"):  # with one weight, all of the budget is its own
            assert not same(ours(**{k: v for k, v in arguments.items() if k != name}, **mask)), name
    assert not mask or not same(ours(**arguments))


def test_iterations_are_read_from_the_name():
    """The more of them, the nearer to the best approximation, which holds most of the weight."""
    layer = nnx.Linear(24, 24, rngs=nnx.Rngs(0))
    held = [
        np.linalg.norm(peft.Linear(layer, r=2, init_lora_weights=name).get_delta_weight("default"))
        for name in ("pissa_niter_0", "pissa_niter_8", "pissa")
    ]
    assert held[0] < 0.99 * held[2] and abs(held[1] / held[2] - 1) < 0.01


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_nothing_else_relies_on_a_base_that_an_initialiser_changed(init, tmp_path):
    """A plain adapter there would be saved, or run after loading, as one for another base, and nothing would tell."""
    _, plain = two()
    plain.save_pretrained(tmp_path / "plain")
    module = base()
    model = peft.get_peft_model(module, config(init_lora_weights=init, lora_dropout=0.5), inputs=(X,))
    for add in (
        lambda: model.add_adapter("more", config()),
        lambda: model.load_adapter(tmp_path / "plain", "more"),
    ):
        with pytest.raises(ValueError, match=f"`init_lora_weights='{init}'` changed the base .*'more'"):
            add()
    model.add_weighted_adapter(["default"], [0.5], "half", "svd", svd_rank=1)
    model.add_weighted_adapter(["default"], [1.0], "off", "cat")
    for layer in model.lora_layers().values():
        layer.set_scale("off", 0.0)
    model.eval()
    if init == "loftq":
        with pytest.raises(ValueError, match="'half' belongs to the quantised base"):
            model.save_pretrained(tmp_path, ["half"])
        return
    model.save_pretrained(tmp_path)
    for name in ("half", "off"):
        model.set_adapter(name)
        again = peft.PeftModel.from_pretrained(module, tmp_path / name, inputs=(X,))
        assert close(again(X), np.asarray(model(X))) and not close(again(X), np.asarray(module(X)))


def test_without_an_adapter_a_base_is_whole_again():
    """Also the one that gave its principal part to the factors, and however these were trained or scaled since."""
    module = base()
    for settings in (dict(lora_dropout=0.5), dict(use_dora=True), dict(bias="all")):
        model = peft.get_peft_model(module, config(init_lora_weights="pissa", **settings), inputs=(X,))
        for variable in (v for _, v in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
            variable[...] = variable[...] + 0.1
        model.lora_layers()["up.kernel"].set_scale("default", 0.5)
        with model.disable_adapter():
            assert close(model(X), np.asarray(module(X)))
        assert not close(model(X), np.asarray(module(X)))
        model.merge_adapter()
        assert close(model.unload()(X), np.asarray(module(X)))
        merged = model(X)
        with model.disable_adapter():
            assert close(model(X), np.asarray(module(X)))
        assert np.array_equal(model(X), merged) and not close(merged, np.asarray(module(X)))
        model.unmerge_adapter()
        model.delete_adapter("default")
        assert close(model(X), np.asarray(module(X)))


def test_what_cannot_be_followed():
    for settings, message in [
        (dict(alora_invocation_tokens=[1]), "`alora_invocation_tokens="),
        (dict(target_modules=None), "`target_modules` is missing"),
        (dict(init_lora_weights="mica"), "`init_lora_weights='mica'`"),
        (dict(init_lora_weights="corda"), "needs `batches=`"),
        (dict(init_lora_weights="pissa_niter_some"), "is written 'pissa_niter_4'"),
        (dict(init_lora_weights="loftq_niter_4"), "other initialisers take none"),
        (dict(target_modules=["upp"]), "`upp` matches nothing; closest"),
    ]:
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(base(), config(**settings), inputs=(X,))
    with pytest.raises(ValueError, match="`batches=`.*asks for no such thing"):
        peft.get_peft_model(base(), config(), inputs=(X,), batches=[X])
    with pytest.raises(TypeError, match=r"`inputs` is a ndarray: write the tuple .* `inputs=\(x,\)`"):
        peft.get_peft_model(base(), config(), inputs=X)
    with pytest.raises(TypeError, match=r"`config` is a LoRAConfig: write a `lora_jax\.peft\.LoraConfig`"):
        peft.get_peft_model(base(), lj.LoRAConfig(), inputs=(X,))
    _, model = two()
    with pytest.raises(TypeError, match=r"is a string; write \['default'\]"):
        model.merge_and_unload(adapter_names="default")
    with pytest.raises(ValueError, match="names an adapter twice"):
        model.set_adapter(["other", "other"])


def test_functions_of_the_library_take_its_adapters():
    module, model = two()
    params = nnx.state(module, nnx.Param)
    graphdef, state = nnx.split(module)
    merged = nnx.merge(graphdef, lj.merge(params, model.adapter()))
    assert close(merged(X), np.asarray(model(X)))
    assert lj.nnx.adapter_of(model).sites == model.adapter().sites == lj.nnx.plan_of(model).sites
    assert close(lj.nnx.merge(model)(X), np.asarray(model(X)))
    del state
