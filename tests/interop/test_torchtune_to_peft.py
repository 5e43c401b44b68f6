"""Adapters under torchtune's names, run by PEFT in a transformers model, and brought back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from lora_torch import rotary_to_half, rotary_to_interleaved  # noqa: E402
from lora_torch import torchtune as tt  # noqa: E402

HEADS, KV_HEADS, HEAD, DIM, HIDDEN, RANK, ALPHA = 4, 2, 6, 24, 40, 3, 5.0
SIZES: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "dim": DIM}
# torchtune's name -> transformers', in one layer, with (out, in).
LAYERS = {
    "layers.0.attn.q_proj": ("model.layers.0.self_attn.q_proj", (HEADS * HEAD, DIM)),
    "layers.0.attn.k_proj": ("model.layers.0.self_attn.k_proj", (KV_HEADS * HEAD, DIM)),
    "layers.0.attn.v_proj": ("model.layers.0.self_attn.v_proj", (KV_HEADS * HEAD, DIM)),
    "layers.0.attn.output_proj": ("model.layers.0.self_attn.o_proj", (DIM, HEADS * HEAD)),
    "layers.0.mlp.w1": ("model.layers.0.mlp.gate_proj", (HIDDEN, DIM)),
    "layers.0.mlp.w2": ("model.layers.0.mlp.down_proj", (DIM, HIDDEN)),
    "layers.0.mlp.w3": ("model.layers.0.mlp.up_proj", (HIDDEN, DIM)),
    "output": ("lm_head", (50, DIM)),
}
ROTARY = {"layers.0.attn.q_proj": HEADS, "layers.0.attn.k_proj": KV_HEADS}


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD, tie_word_embeddings=False, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def adapter(dora: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    out = {}
    for module, (_, (rows, columns)) in LAYERS.items():
        out[f"{module}.lora_a.weight"] = torch.randn(RANK, columns, generator=generator)
        out[f"{module}.lora_b.weight"] = torch.randn(rows, RANK, generator=generator)
        if dora:
            out[f"{module}.magnitude"] = 1 + torch.rand(rows, generator=generator)
    return out


def directory(path: Path, weights: dict[str, Any], dora: bool) -> Path:
    config = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA", "target_modules": list(tt_targets())}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(tt.tune_to_peft_adapter_config(config, "base", use_dora=dora)))
    save_file(weights, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def tt_targets() -> list[str]:
    return [name.rpartition(".")[2] for name in LAYERS]


def merged_by_peft(path: Path) -> dict[str, Any]:
    model = peft.PeftModel.from_pretrained(llama(), path).merge_and_unload()
    return {module: model.get_submodule(name).weight.detach() for module, (name, _) in LAYERS.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_peft_merges_to_what_torchtune_merges(dora: bool, tmp_path: Path) -> None:
    hf = llama()
    state = adapter(dora)
    # The base as torchtune holds it: q and k rows interleaved.
    for module, (name, _) in LAYERS.items():
        weight = hf.get_submodule(name).weight.detach()
        state[f"{module}.weight"] = rotary_to_interleaved(weight, ROTARY[module]) if module in ROTARY else weight
    merged = tt.get_merged_lora_ckpt(state, RANK, ALPHA)
    want = {
        module: rotary_to_half(merged[f"{module}.weight"], ROTARY[module])
        if module in ROTARY
        else merged[f"{module}.weight"]
        for module in LAYERS
    }
    converted = tt.tune_to_peft_adapter_weights(adapter(dora), **SIZES)
    got = merged_by_peft(directory(tmp_path / "a", converted, dora))
    for module in LAYERS:
        torch.testing.assert_close(got[module], want[module], rtol=1e-5, atol=1e-5)
        assert (want[module] - llama().get_submodule(LAYERS[module][0]).weight).abs().max() > 0.1
    if not dora:
        return
    # Magnitudes in torchtune's order, as torchtune itself writes them, give another model.
    for module, (name, _) in LAYERS.items():
        converted[f"base_model.model.{name}.lora_magnitude_vector"] = state_of(adapter(True), module)
    wrong = merged_by_peft(directory(tmp_path / "b", converted, dora))
    assert [m for m in LAYERS if not torch.allclose(wrong[m], want[m], atol=1e-3)] == list(ROTARY)


def state_of(state: dict[str, Any], module: str) -> Any:
    return state[f"{module}.magnitude"].clone()


def test_there_and_back_is_exact() -> None:
    state = adapter(dora=True)
    weights = tt.tune_to_peft_adapter_weights(state, **SIZES)
    assert set(weights) == {
        f"base_model.model.{name}.{part}"
        for name, _ in LAYERS.values()
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }
    back = tt.peft_to_tune_adapter_weights(weights, **SIZES)
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
    # Only what moves is copied.
    shared = [name for name in state if back[name].data_ptr() == state[name].data_ptr()]
    assert len(state) - len(shared) == 4
    as_numpy = tt.tune_to_peft_adapter_weights({name: x.numpy() for name, x in state.items()}, head_dim=HEAD, **SIZES)
    assert all(np.array_equal(weights[name].numpy(), as_numpy[name]) for name in weights)


def test_what_is_no_decoder_is_refused() -> None:
    state = adapter(dora=False)
    state["layers.0.attn.qkv.lora_a.weight"] = torch.zeros(3, 24)
    with pytest.raises(ValueError, match="Error converting the state dict. Found unexpected key.*attn.qkv"):
        tt.tune_to_peft_adapter_weights(state, **SIZES)
    with pytest.raises(ValueError, match=r"q_proj \(b\) has 24 rows, which are not 32 heads of 128: state the model's"):
        tt.tune_to_peft_adapter_weights(adapter(dora=False))
    with pytest.raises(ValueError, match="holds adapters only"):
        tt.tune_to_peft_adapter_weights({"layers.0.attn.v_proj.weight": torch.zeros(12, 24)}, **SIZES)


def test_configuration() -> None:
    config = {"target_modules": ["q_proj", "output_proj", "w1", "w2", "w3", "output"], "r": 3, "lora_alpha": 5.0}
    before = json.dumps(config)
    got = tt.tune_to_peft_adapter_config(config, "some/base")
    assert got == {
        "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj", "up_proj", "lm_head"],
        "r": 3,
        "lora_alpha": 5.0,
        "base_model_name_or_path": "some/base",
    }
    assert json.dumps(config) == before
    assert tt.tune_to_peft_adapter_config(config, use_dora=True)["use_dora"] is True
    with pytest.raises(ValueError, match=r"PEFT adapter config requires .*\['r'\] missing"):
        tt.tune_to_peft_adapter_config({"target_modules": ["q_proj"], "lora_alpha": 5.0})
    with pytest.raises(ValueError, match="Unknown target module o_proj; there are q_proj"):
        tt.tune_to_peft_adapter_config({**config, "target_modules": ["o_proj"]})
    with pytest.raises(ValueError, match="`target_modules` must be a list of names, got 'q_proj'"):
        tt.tune_to_peft_adapter_config({**config, "target_modules": "q_proj"})


def test_no_heads():
    with pytest.raises(ValueError, match="`num_heads` must be positive, got 0"):
        tt.tune_to_peft_adapter_weights({}, num_heads=0)
