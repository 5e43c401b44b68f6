"""Tiny models with real PEFT adapters in directories, and ways to spoil them, for the tests of `lora-jax merge`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.cli import main

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LOGITS = 1e-5  # float32 logits of order one; a dropped or half-scaled adapter moves them by 1e-2 and more
WORDS = 48
R4 = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
P = "base_model.model."
Q1 = P + "model.layers.1.self_attn.q_proj"
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(tie=False):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tie,
        )
    )


def gpt2(kind="GPT2LMHeadModel"):
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return getattr(transformers, kind)(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def outputs(model):
    model.eval()
    ids = torch.arange(24).reshape(2, 12) * 7 % WORDS
    image = torch.sin(torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16) / 9.0)
    with torch.no_grad():
        out = model(image if model.config.model_type == "vit" else ids)
    return (out.logits if "logits" in out else out.last_hidden_state).float().numpy()


def spread(model):
    """Spreads the parameters, so that norms, biases and positions take part in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_pair(tmp_path, model, config, shard="5GB"):
    """A base directory and a random adapter of it. **Returns:** the logits (adapted, base)."""
    spread(model).save_pretrained(tmp_path / "base", max_shard_size=shard)
    base = outputs(model)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                # peft draws an embedding's factors ten times larger than the others'.
                parameter.mul_(0.1 if "lora_embedding" in name else 1.0)
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    want = outputs(adapted)
    assert np.abs(want - base).max() > 1e-2  # a dropped adapter would be noticed
    return want, base


def merge(tmp_path, *options):
    return main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out")), *options])


def load(tmp_path, kind, **options):
    """Loads the merged model, and allows no missing or unexpected key."""
    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sharded base and an adapter, to be copied and spoilt."""
    path = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    config = peft.LoraConfig(**R4, target_modules=["q_proj", "v_proj"])
    save_pair(path, llama(), config, "20KB")
    return path


def edit_json(name, **changes):
    def change(d):
        values = json.loads((d / name).read_text())
        (d / name).write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v is not ...}))

    return change


def edit_tensors(name, edit):
    def change(d):
        path = next(d.glob(name))
        tensors = load_file(path)
        edit(tensors)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata={"format": "pt"})

    return change


def edit_adapter(edit):
    return edit_tensors(ADAPTER, edit)


def whole(directory):
    """The tensors of all shards."""
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
