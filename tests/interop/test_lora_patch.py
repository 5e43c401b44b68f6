"""Adapting a model in place: names, freezing, what is refused, and that a refusal changes nothing."""

import copy
import logging
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from lora_torch.lora import (  # noqa: E402
    LinearLoRA,
    PeftConfig,
    TritonLinearLoRA,
    apply_lora_to_linear_modules,
    patch_linear_module,
)
from tests.interop.lora_problem import randomise  # noqa: E402


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 4, bias=False)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.v_proj(torch.relu(self.q_proj(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layers[0](x))


class Int8Linear(nn.Linear):
    """A quantised layer as others write them: packed weight, forward of its own."""

    def __init__(self, dense: nn.Linear):
        super().__init__(dense.in_features, dense.out_features, device="meta")
        step = dense.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((dense.weight.detach() / step).round().to(torch.int8), requires_grad=False)
        self.bias = dense.bias
        self.register_buffer("step", step)

    def forward(self, x):
        return F.linear(x, self.weight * self.step, self.bias)


def picture(model):
    """All that adapting changes."""
    modules = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    return modules, {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


def test_names_and_freezing():
    model = Model()
    before = {name: id(p) for name, p in model.named_parameters()}
    keys = set(model.state_dict())
    x = torch.randn(5, 6)
    want = model(x)
    assert apply_lora_to_linear_modules(model, PeftConfig(["*.q_proj", "*.v_proj"], dim=2)) == 2
    assert torch.equal(model(x), want)  # B is zero
    added = {f"layers.0.{layer}.{factor}.weight" for layer in ("q_proj", "v_proj") for factor in ("lora_A", "lora_B")}
    assert set(model.state_dict()) == keys | added
    assert {name: id(p) for name, p in model.named_parameters() if name in before} == before
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added
    assert model.layers[0].q_proj.lora_A.weight.shape == (2, 6) and model.layers[0].v_proj.lora_B.weight.shape == (4, 2)
    randomise(model)
    assert not torch.allclose(model(x), want, atol=0.1)
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def test_training_moves_the_adapter_alone():
    model = Model()
    apply_lora_to_linear_modules(model, PeftConfig(["*_proj"], dim=2, dropout=0.1))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # in the first step A has no gradient, since B is zero
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_a_second_call_adds_to_the_first():
    model = Model()
    apply_lora_to_linear_modules(model, PeftConfig(["*.q_proj"]))
    assert apply_lora_to_linear_modules(model, PeftConfig(["*.v_proj"])) == 1
    assert model.layers[0].q_proj.lora_A.weight.requires_grad
    # Factors are linear layers too, and never meant.
    assert apply_lora_to_linear_modules(model, PeftConfig(exclude_modules=["*.q_proj", "*.v_proj"])) == 1
    assert isinstance(model.head, LinearLoRA)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj: has an adapter already"):
        apply_lora_to_linear_modules(model, PeftConfig(match_all_linear=True))


def test_skip_freeze_and_the_other_selections():
    model = Model()
    assert apply_lora_to_linear_modules(model, PeftConfig(exclude_modules=["head"]), skip_freeze=True) == 2
    assert model.head.weight.requires_grad and not model.layers[0].q_proj.weight.requires_grad
    model = Model()
    assert apply_lora_to_linear_modules(model, PeftConfig(match_all_linear=True)) == 3
    assert apply_lora_to_linear_modules(Model(), PeftConfig()) == 2  # *_proj


@pytest.mark.parametrize("dora", [False, True])
def test_meta_modules(dora):
    with torch.device("meta"):
        model = Model()
    apply_lora_to_linear_modules(model, PeftConfig(["*_proj"], dim=2, use_dora=dora, lora_dtype="bfloat16"))
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(5, 6, device="meta")).shape == (5, 3)
    model.to_empty(device="cpu")
    layer = model.layers[0].q_proj
    layer.reset_parameters()
    layer.init_lora_weights("xavier")
    if dora:
        layer.init_dora_magnitude()
    x = torch.randn(5, 6)
    # The magnitude is rounded to bfloat16.
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=0.02 if dora else 0)


def test_magnitudes_of_meta_modules_are_not_made_up():
    layer = patch_linear_module(nn.Linear(4, 4, device="meta"), use_dora=True, use_triton=False)
    with pytest.raises(RuntimeError, match="weights are on the meta device"):
        layer.init_dora_magnitude()
    with pytest.raises(RuntimeError, match="no magnitude: the module was made with use_dora=False"):
        LinearLoRA(nn.Linear(4, 4)).init_dora_magnitude()


def test_a_quantised_base_keeps_its_forward():
    dense = nn.Linear(6, 5)
    layer = Int8Linear(dense)
    x = torch.randn(3, 6, requires_grad=True)
    base = layer(x)
    assert not torch.equal(base, dense(x))
    patched = patch_linear_module(layer, 2, 4, lora_dtype="float32", use_triton=False)
    assert patched is layer and isinstance(patched, Int8Linear) and isinstance(patched, LinearLoRA)
    randomise(patched)
    y = patched(x)
    low = x @ patched.lora_A.weight.T @ patched.lora_B.weight.T * 2
    assert torch.allclose(y, base + low, atol=1e-6) and not torch.allclose(y, base, atol=0.1)
    y.sum().backward()
    whole = layer.weight * layer.step + 2 * patched.lora_B.weight @ patched.lora_A.weight
    assert torch.allclose(x.grad, whole.sum(0).expand(3, 6), atol=1e-5)
    with pytest.raises(NotImplementedError, match="the base is packed .*int8.*: dequantise it first"):
        patched.materialize_effective_weight()
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert type(other) is type(patched) and torch.equal(other(x), patched(x))


def test_the_dtype_of_a_quantisation_config():
    class Bits:
        bnb_4bit_compute_dtype = torch.float16

    for config, dtype in ((Bits(), torch.float16), (object(), torch.bfloat16)):
        model = nn.Sequential(Int8Linear(nn.Linear(6, 5)))
        apply_lora_to_linear_modules(model, PeftConfig(match_all_linear=True), quantization_config=config)
        assert model[0].lora_A.weight.dtype == dtype


def hooked():
    layer = nn.Linear(4, 4)
    layer.forward = layer.forward
    return layer


@pytest.mark.parametrize(
    "make,options,error,message",
    [
        (lambda: nn.Conv2d(3, 3, 1), {}, NotImplementedError, "q: a Conv2d is not an nn.Linear"),
        (lambda: LinearLoRA(nn.Linear(4, 4)), {}, ValueError, "q: has an adapter already"),
        (lambda: nn.LazyLinear(4), {}, ValueError, "q: is lazy and has no shape yet"),
        (hooked, {}, ValueError, "q: has a `forward` set on the module itself"),
        (lambda: Int8Linear(nn.Linear(4, 4)), {}, ValueError, "q: has a packed weight .*int8.*say lora_dtype"),
        (
            lambda: Int8Linear(nn.Linear(4, 4)),
            {"use_dora": True, "lora_dtype": "float32"},
            ValueError,
            "q: has a packed weight .*int8.*: DoRA needs the norms",
        ),
        (lambda: nn.Linear(4, 4).double(), {"use_triton": True}, TypeError, "q: is float64: the Triton kernels take"),
        (lambda: nn.Linear(4, 4), {"dropout_position": "mid"}, ValueError, "dropout_position='mid'"),
        (lambda: nn.Linear(4, 4), {"dim": 0}, ValueError, "dim=0"),
    ],
)
def test_what_a_layer_refuses(make, options, error, message):
    layer = make()
    before = picture(layer)
    with pytest.raises(error, match=message):
        patch_linear_module(layer, layer_name="q", **{"use_triton": False} | options)
    assert picture(layer) == before


@pytest.mark.parametrize(
    "targets,message",
    [
        (["q_proj"], r"target_modules: 'q_proj' matches no linear layer of Model; .*whole names: write '\*\.q_proj'"),
        (["*.q_proj", "*.k_proj"], r"'\*\.k_proj' matches no linear layer of Model; nearest: layers\.0\.\w_proj"),
        (["*.norm"], r"'\*\.norm' matches 'layers\.0\.norm', a LayerNorm, and no nn\.Linear"),
    ],
)
def test_targets_that_match_nothing(targets, message):
    model = Model()
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        apply_lora_to_linear_modules(model, PeftConfig(targets))
    assert picture(model) == before


def test_one_bad_layer_leaves_the_others_alone():
    model = Model()
    model.layers[0].v_proj = Int8Linear(nn.Linear(6, 4))
    before = picture(model)
    with pytest.raises(ValueError, match=r"layers\.0\.v_proj: has a packed weight"):
        apply_lora_to_linear_modules(model, PeftConfig(["*_proj"]))
    assert picture(model) == before
    config = PeftConfig(["*.q_proj"])
    config.dim = -1  # fields may change after the first check
    with pytest.raises(ValueError, match="dim=-1"):
        apply_lora_to_linear_modules(model, config)
    with pytest.raises(TypeError, match="peft_config is a dict"):
        apply_lora_to_linear_modules(model, {"dim": 4})
    assert picture(model) == before


def test_layers_that_are_read_and_not_called():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = picture(model)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj: nn\.MultiheadAttention reads this layer's weight"):
        apply_lora_to_linear_modules(model, PeftConfig(match_all_linear=True))
    with pytest.raises(ValueError, match=r"linear1: the fast path .*set_fastpath_enabled\(False\)"):
        apply_lora_to_linear_modules(model, PeftConfig(["linear1"]))
    assert picture(model) == before
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        apply_lora_to_linear_modules(model, PeftConfig(["linear1"]))
        model.eval()
        x = torch.randn(1, 3, 8)
        without = model(x)
        randomise(model)
        assert not torch.allclose(model(x), without, atol=0.01)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_adapters_of_another_kind():
    """A second adapter on the parts of a first would train, and belong to neither."""
    peft = pytest.importorskip("peft")
    from lora_torch import torchtune as tt

    tune = nn.Sequential(tt.LoRALinear(4, 4, 2, 2.0))
    other = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["q_proj"]))
    for model, name in ((tune, "0.lora_a"), (other, r"base_model.model.layers.0.q_proj.base_layer")):
        before = picture(model)
        with pytest.raises(ValueError, match=rf"^{name}: is a part of the adapter of a (LoRALinear|Linear) already"):
            apply_lora_to_linear_modules(model, PeftConfig(match_all_linear=True))
        assert picture(model) == before
    assert apply_lora_to_linear_modules(other, PeftConfig(["*.v_proj"])) == 1  # the other layers are free


def test_a_root_without_a_name():
    with pytest.raises(ValueError, match=r"of Linear; it is one itself, .*: call patch_linear_module"):
        apply_lora_to_linear_modules(nn.Linear(4, 4), PeftConfig())
    assert apply_lora_to_linear_modules(nn.Linear(4, 4), PeftConfig(match_all_linear=True)) == 1


def test_one_layer_in_two_places_is_one():
    model = nn.ModuleDict({"a_proj": (shared := nn.Linear(3, 3)), "b_proj": shared})
    assert apply_lora_to_linear_modules(model, PeftConfig(["b_proj"])) == 1
    assert isinstance(model["a_proj"], LinearLoRA)


class Experts(nn.Module):
    def __init__(self, top_k=2):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(4, 4)
        self.experts = nn.ModuleList([Model() for _ in range(2)])


def test_ranks_of_experts(caplog):
    model = nn.ModuleDict({"moe": Experts()})
    config = PeftConfig(match_all_linear=True, dim=7, alpha=14, moe_rank_scaling=True)
    with caplog.at_level(logging.WARNING):
        assert apply_lora_to_linear_modules(model, config) == 7
    assert model["moe"].gate.dim == 7 and model["moe"].gate.scale == 2
    expert = model["moe"].experts[1].head
    assert expert.dim == expert.lora_A.weight.shape[0] == 3 and expert.scale == 14 / 3
    assert "moe.experts.1.head: dim=7 is no multiple of 2 active experts: rank 3" in caplog.text
    for experts, message in ((Experts(8), "dim=7 among 8 active experts"), (Experts(None), "no number of active")):
        before = picture(experts)
        with pytest.raises(ValueError, match=r"experts\.0\..*: moe_rank_scaling .*" + message):
            apply_lora_to_linear_modules(experts, config)
        assert picture(experts) == before
    caplog.clear()
    dense = Model()
    with caplog.at_level(logging.WARNING):
        count = apply_lora_to_linear_modules(dense, config)
    assert f"moe_rank_scaling: none of the {count} layers to adapt is below a module `experts`" in caplog.text


def test_triton_is_what_it_says():
    model = Model()
    apply_lora_to_linear_modules(model, PeftConfig(["*_proj"], use_triton=True, use_dora=True))
    assert type(model.layers[0].q_proj) is TritonLinearLoRA
    assert isinstance(patch_linear_module(nn.Linear(4, 4)), TritonLinearLoRA)  # the documents' default


def test_neither_jax_nor_triton_is_needed():
    code = """
import sys
sys.modules["jax"] = sys.modules["triton"] = None
import torch
from lora_torch.lora import PeftConfig, apply_lora_to_linear_modules
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
apply_lora_to_linear_modules(model, PeftConfig(match_all_linear=True))
model(torch.ones(2, 4)).sum().backward()
before = model.state_dict().keys()
try:
    apply_lora_to_linear_modules(torch.nn.Sequential(torch.nn.Linear(4, 4)), PeftConfig(["0"], use_triton=True))
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0: use_triton=True needs triton: install `lora-jax[triton]`, or write use_triton")


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model is a dict: pass a torch.nn.Module"):
        apply_lora_to_linear_modules({}, PeftConfig())  # pyright: ignore[reportArgumentType]
    layer = patch_linear_module(nn.Linear(4, 4), 2, use_triton=False)
    with pytest.raises(ValueError, match="the layer: has an adapter already"):
        patch_linear_module(layer, 2, use_triton=False)
