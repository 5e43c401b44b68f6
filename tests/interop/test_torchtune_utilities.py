"""What is asked of a model of adapter modules, of its state dict, and of what loading it returned."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from lora_torch import torchtune as tt  # noqa: E402
from tests.interop.torchtune_cases import Tree, fill  # noqa: E402


def tree() -> Any:
    torch.manual_seed(0)
    out = Tree(tt)
    fill(out)
    return out


ADAPTER = [
    "layers.0.attn.q_proj.magnitude",
    "layers.0.attn.q_proj.lora_a.weight",
    "layers.0.attn.q_proj.lora_b.weight",
    "layers.0.attn.k_proj.lora_a.weight",
    "layers.0.attn.k_proj.lora_b.weight",
    "layers.0.mlp.w1.lora_a.weight",
    "layers.0.mlp.w1.lora_b.weight",
    "output.lora_a.weight",
    "output.lora_b.weight",
]


def test_adapter_parameters() -> None:
    model = tree()
    found = tt.get_adapter_params(model)
    assert sorted(found) == sorted(ADAPTER)
    own = dict(model.named_parameters())
    assert all(found[name] is own[name] for name in found)
    tt.set_trainable_params(model, found)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(ADAPTER)
    tt.set_trainable_params(model, {"output.bias"})
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["output.bias"]
    assert sorted(tt.get_adapter_state_dict(model.state_dict())) == sorted(ADAPTER)
    assert list(tt.get_adapter_params(tt.LoRALinear(4, 4, 2, 2.0))) == ["lora_a.weight", "lora_b.weight"]
    assert isinstance(model.output, tt.AdapterModule) and not isinstance(model, tt.AdapterModule)


def test_names_that_do_not_exist() -> None:
    class Broken(tt.LoRALinear):
        def adapter_params(self) -> list[str]:
            return ["lora_a.weight", "lora_c.weight"]

    model = tree()
    model.layers[0].mlp.w1 = Broken(8, 6, 2, 3.0)
    with pytest.raises(
        AssertionError, match=r"Adapter params \['lora_c.weight'\] not converted: Broken at `layers.0.ml"
    ):
        tt.get_adapter_params(model)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"no parameters \['output.lora_a'\]; nearest: output.lora_a.weight"):
        tt.set_trainable_params(model, {"output.lora_a", "output.lora_b.weight"})
    assert [p.requires_grad for p in model.parameters()] == before


def test_module_names_leave_the_list_alone() -> None:
    attention: Any = ["q_proj", "v_proj"]
    assert tt.get_lora_module_names(attention, False, True) == ["q_proj", "v_proj", "output"]
    assert tt.get_lora_module_names(attention, True, False) == ["q_proj", "v_proj", "w1", "w2", "w3"]
    assert attention == ["q_proj", "v_proj"]


class Stubborn(tt.LoRALinear):
    """Refuses to be switched off."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "disabled" and value is True and not self.disabled:
            raise RuntimeError("stays on")
        super().__setattr__(name, value)


def test_disabled_adapters_come_back_as_they_were() -> None:
    model = tree()
    model.output.disabled = True
    x = torch.ones(1, 8)
    adapted = model.layers[0].mlp.w1(x)
    with pytest.raises(KeyError), tt.disable_adapter(model):
        assert all(m.disabled for m in model.modules() if isinstance(m, tt.AdapterModule))
        torch.testing.assert_close(model.layers[0].mlp.w1(x), x @ model.layers[0].mlp.w1.weight.T)
        raise KeyError
    assert model.output.disabled and not model.layers[0].mlp.w1.disabled
    model.output.disabled = False
    model.output.__class__ = Stubborn
    with pytest.raises(RuntimeError, match="stays on"), tt.disable_adapter(model):
        pass
    assert not model.layers[0].mlp.w1.disabled  # it had been switched off before the last one refused
    assert torch.equal(model.layers[0].mlp.w1(x), adapted)
    assert (adapted - x @ model.layers[0].mlp.w1.weight.T).abs().max() > 0.1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = tt.LoRALinear(6, 5, 2, 3.0, use_bias=True)
        self.down = tt.DoRALinear(5, 4, 2, 3.0, use_bias=True)

    def forward(self, x: Any) -> Any:
        return self.down(torch.tanh(self.up(x)))


def test_a_merged_checkpoint_computes_the_same_in_plain_layers() -> None:
    model = Block()
    fill(model)
    x = torch.randn(3, 6)
    state = model.state_dict()
    merged = tt.get_merged_lora_ckpt(state, 2, 3.0)
    assert merged is state and list(state) == ["up.weight", "up.bias", "down.weight", "down.bias"]
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    plain.load_state_dict({k.replace("up.", "0.").replace("down.", "2."): v for k, v in merged.items()})
    torch.testing.assert_close(plain(x), model(x))
    with tt.disable_adapter(model):
        assert not torch.allclose(plain(x), model(x), atol=0.1)
    # The dict shared the model's tensors: the model still holds its own base.
    assert not torch.equal(model.up.weight, merged["up.weight"])


def test_merging_at_the_root_experts_and_half_precision() -> None:
    layer = tt.LoRALinear(6, 5, 2, 3.0)
    fill(layer)
    layer.to(torch.bfloat16)
    merged = tt.get_merged_lora_ckpt(layer.state_dict(), 2, 3.0)["weight"]
    w, a, b = (p.detach().double() for p in (layer.weight, layer.lora_a.weight, layer.lora_b.weight))
    assert torch.equal(merged, (w + 1.5 * b @ a).bfloat16())  # rounded once

    torch.manual_seed(0)
    shapes = {"gate_proj": (3, 6, 5), "lora_gate_a": (3, 6, 2), "lora_gate_b": (3, 2, 5)}
    experts = {f"mlp.experts.{name}": torch.randn(shape) for name, shape in shapes.items()}
    w, a, b = experts.values()
    merged = tt.get_merged_lora_ckpt(dict(experts), 2, 3.0)
    assert list(merged) == ["mlp.experts.gate_proj"]
    want = torch.stack([w[e] + 1.5 * a[e] @ b[e] for e in range(3)])
    torch.testing.assert_close(merged["mlp.experts.gate_proj"], want)
    assert not torch.allclose(w, want, atol=0.1)


def test_what_cannot_be_merged_is_left_as_it_was() -> None:
    state = tree().state_dict()
    del state["output.weight"], state["layers.0.mlp.w1.lora_b.weight"]
    state["layers.0.attn.lora_q"] = torch.zeros(1)
    state["layers.0.attn.q_proj.magnitude"] = torch.zeros(3)
    before = dict(state)
    with pytest.raises(ValueError) as failure:
        tt.get_merged_lora_ckpt(state, 2, 3.0)
    for text in (
        "layers.0.mlp.w1.lora_a.weight: no lora_b beside it",
        "output.lora_a.weight: there is no base weight output.weight",
        "layers.0.attn.lora_q: no factor has this name",
        "layers.0.attn.q_proj.magnitude is (3,), but layers.0.attn.q_proj.weight is (8, 8)",
    ):
        assert text in str(failure.value)
    assert state.keys() == before.keys() and all(state[name] is before[name] for name in state)
    with pytest.raises(ValueError, match=r"takes factors \(4, 8\) and \(8, 4\) at `rank=4`, found \(2, 8\)"):
        tt.get_merged_lora_ckpt(tree().state_dict(), 4, 3.0)
    with pytest.raises(ValueError, match="needs a process group"):
        tt.get_merged_lora_ckpt(tree().state_dict(), 2, 3.0, use_distributed_barriers=True)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda w: w.to(torch.int8), "weight is torch.int8, which would cut off the update: dequantise it first"),
        (lambda w: w.to("meta"), "weight and its factors: some are on the meta device"),
    ],
)
def test_bases_that_cannot_take_the_update(change: Any, message: str) -> None:
    state = {**tree().state_dict()}
    name = "layers.0.mlp.w1.weight"
    state[name] = change(state[name])
    before = dict(state)
    with pytest.raises(ValueError, match=message):
        tt.get_merged_lora_ckpt(state, 2, 3.0)
    assert state.keys() == before.keys() and all(state[each] is before[each] for each in state)
    with pytest.raises(ValueError, match="`alpha` must be finite, got inf"):
        tt.get_merged_lora_ckpt(tree().state_dict(), 2, float("inf"))


def test_what_two_loads_leave_open() -> None:
    model = tree()
    keys = list(model.state_dict())
    base = {name: value for name, value in model.state_dict().items() if name not in ADAPTER}
    adapter = {name: value for name, value in model.state_dict().items() if name in ADAPTER}
    first = model.load_state_dict(base, strict=False)
    second = model.load_state_dict(adapter, strict=False)
    check = tt.validate_missing_and_unexpected_for_lora
    loads = (first.missing_keys, first.unexpected_keys, second.missing_keys, second.unexpected_keys)
    check(None, None, None, keys, *loads)
    check(state_dict_keys=keys, base_missing=ADAPTER)  # an adapter that starts anew
    with pytest.raises(RuntimeError) as failure:
        check(
            None, None, None, keys,
            [*ADAPTER, "output.bias", "strange"], ["other.weight"],
            [*base, "output.lora_a.weight", "strange"], ["lora.x"],
        )  # fmt: skip
    assert str(failure.value).splitlines()[1:] == [
        "Missing LoRA key output.lora_a.weight from adapter state dict",
        "Missing non-LoRA key output.bias from base model dict",
        "Unexpected key found missing: strange",
        "Unexpected key loading base model: other.weight",
        "Unexpected key loading adapter: lora.x",
    ]
    with pytest.raises(ValueError, match="pass `state_dict_keys"):
        check(base_missing=["output.bias"])


def test_what_two_loads_leave_open_by_module_names() -> None:
    def check(*loads: Any) -> None:
        with pytest.warns(FutureWarning, match="deprecated"):
            tt.validate_missing_and_unexpected_for_lora(["q_proj", "k_proj"], True, True, None, *loads)

    check(ADAPTER, [], ["output.bias"], [])
    with pytest.raises(RuntimeError, match="Missing non-LoRA key output.bias from base model dict"):
        check([*ADAPTER, "output.bias"])
    with pytest.raises(RuntimeError, match="Missing LoRA key layers.0.attn.q_proj.magnitude from adapter state dict"):
        check(None, None, ADAPTER)
    with pytest.raises(RuntimeError, match="Unexpected key loading adapter"):
        check(None, None, None, ["x"])
