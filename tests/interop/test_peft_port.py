"""`LoraConfig` has the fields and defaults of the installed PEFT's, and directories go both ways."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("peft")

from lora_jax import peft  # noqa: E402
from tests.front_ends.peft_mlp import BOTH, X, base, config  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of its own deprecations


def test_fields_and_defaults():
    ours = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}
    want = {f.name for f in dataclasses.fields(theirs.LoraConfig)}
    assert want <= set(ours), want - set(ours)
    mine, its = peft.LoraConfig().to_dict(), theirs.LoraConfig().to_dict()
    differing = {k: (mine[k], its[k]) for k in its if k in mine and mine[k] != its[k] and (mine[k] or its[k])}
    differing.pop("peft_version", None)
    assert not differing or set(differing) <= {"runtime_config"}, differing


def test_task_types():
    assert {t.value for t in theirs.TaskType} == {t.value for t in peft.TaskType}
    stored = json.loads(json.dumps(config(task_type=peft.TaskType.CAUSAL_LM).to_dict()))
    assert theirs.LoraConfig(**stored).task_type == theirs.TaskType.CAUSAL_LM


def torch_twin(module):
    twin = torch.nn.Sequential()
    for name in BOTH:
        layer = getattr(module, name)
        linear = torch.nn.Linear(*layer.kernel.shape)
        linear.weight.data = torch.tensor(np.asarray(layer.kernel[...]).T)
        linear.bias.data = torch.tensor(np.asarray(layer.bias[...]))
        twin.add_module(name, linear)
        if name == "up":
            twin.add_module("tanh", torch.nn.Tanh())
    return twin


def outputs(model):
    with torch.no_grad():
        return model(torch.tensor(X)).numpy()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"up": 3}}, {"use_dora": True}])
def test_directories_both_ways(settings, tmp_path):
    module = base()
    model = peft.get_peft_model(module, config(**settings), inputs=(X,))
    model.add_adapter("other", config(r=3, target_modules=["up"]))
    model.save_pretrained(tmp_path / "ours")
    twin = theirs.PeftModel.from_pretrained(torch_twin(module), tmp_path / "ours")
    np.testing.assert_allclose(outputs(twin), model(X), atol=1e-5)
    twin.load_adapter(tmp_path / "ours" / "other", "other")
    twin.set_adapter("other")
    model.set_adapter("other")
    np.testing.assert_allclose(outputs(twin), model(X), atol=1e-5)
    assert np.abs(outputs(torch_twin(module)) - np.asarray(model(X))).max() > 0.05

    torch.manual_seed(0)
    same = theirs.LoraConfig(r=2, lora_alpha=4, target_modules=BOTH, init_lora_weights=False, **settings)
    source = theirs.get_peft_model(torch_twin(module), same)
    source.save_pretrained(tmp_path / "theirs")
    back = peft.PeftModel.from_pretrained(module, tmp_path / "theirs", inputs=(X,))
    np.testing.assert_allclose(back(X), outputs(source), atol=1e-5)
    assert back.peft_config["default"].inference_mode and np.abs(np.asarray(back(X) - module(X))).max() > 0.05


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=16, lora_alpha=3),
        dict(r=16, lora_alpha=3, use_rslora=True),
        dict(rank_pattern={"up": 8}, alpha_pattern={"down": 10}),
        dict(rank_pattern={"up": 8}, alpha_pattern={"up": 10}, use_rslora=True),
        dict(r=8, lora_alpha=1, rank_pattern={"up": 8}, alpha_pattern={"up|down": 2}),  # the same rank, said again
        dict(r=8, lora_alpha=1, alpha_pattern={"up|down": 2}),
    ],
)
def test_ranks_and_scales(settings):
    settings = {"r": 2, "lora_alpha": 4, "target_modules": BOTH, **settings}
    twin = theirs.get_peft_model(torch_twin(base()), theirs.LoraConfig(**settings)).base_model.model
    mine = peft.get_peft_model(base(), peft.LoraConfig(**settings), inputs=(X,)).lora_layers()
    for name in BOTH:
        layer, its = mine[f"{name}.kernel"], getattr(twin, name)
        assert layer.r == its.r and layer.lora_alpha == its.lora_alpha
        assert layer.scaling == pytest.approx(its.scaling, rel=1e-12)


# Parts of keys, of modules and of each other.
HOSTILE = ["default", "def", "lora_A", "lora_", "up", "weight", "base_model", "__base__", "1", "up.kernel", "a b"]


def test_names_of_adapters_are_in_no_key(tmp_path):
    """Adapters with equal factors are equal files, whatever they are called; each is still told from the others."""
    model = peft.get_peft_model(base(), config(), HOSTILE[0], inputs=(X,))
    for name in HOSTILE[1:]:
        model.add_adapter(name, config())
        model.lora[name] = nnx.clone(model.lora["default"])
    model.add_adapter("defaul", config(r=1))
    for name in [*HOSTILE, "defaul"]:
        model.set_adapter(name)
        assert model.active_adapter == name and set(model.lora_layers()["up.kernel"].active_adapters) == {name}
    model.save_pretrained(tmp_path)
    stored = {
        n: load_file((tmp_path if n == "default" else tmp_path / n) / "adapter_model.safetensors") for n in HOSTILE
    }
    assert {"base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"} < set(stored["default"])
    for name in HOSTILE[1:]:
        assert stored[name].keys() == stored["default"].keys()
        assert all(np.array_equal(stored[name][key], value) for key, value in stored["default"].items())
    twin = theirs.PeftModel.from_pretrained(torch_twin(model.base), tmp_path / "lora_A", "lora_A")
    model.set_adapter("lora_A")
    np.testing.assert_allclose(outputs(twin), model(X), atol=1e-5)
    model.set_adapter("defaul")
    assert np.abs(outputs(twin) - np.asarray(model(X))).max() > 0.01
    for name in ("", ".", "..", "../up", "a/b", 3):
        with pytest.raises(ValueError, match="must be usable as the name of one folder"):
            model.add_adapter(name, config())


def test_linen_keeps_its_names(tmp_path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="down")(jax.numpy.tanh(nn.Dense(8, name="up")(x)))

    module = base()
    params = {n: {"kernel": getattr(module, n).kernel[...], "bias": getattr(module, n).bias[...]} for n in BOTH}
    model = peft.get_peft_model(peft.from_linen(Model(), params), config(), inputs={"x": X})
    model.save_pretrained(tmp_path, names="linen")
    twin = theirs.PeftModel.from_pretrained(torch_twin(module), tmp_path)
    np.testing.assert_allclose(outputs(twin), model(x=X), atol=1e-5)
