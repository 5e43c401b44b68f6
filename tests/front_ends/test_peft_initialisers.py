"""`init_lora_weights` and its settings in `lora_jax.peft`: each reaches its initialiser."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax import inits, peft
from tests.front_ends.peft_mlp import X, base, close, config, two


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
