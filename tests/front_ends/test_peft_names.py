"""The names of PEFT over Flax: the state of a model with several adapters, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax import peft
from tests.front_ends.peft_mlp import Mlp, X, base, by_hand, close, config, two


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
