"""Models and texts small enough to train in a second, written as a user would have them on disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_examples import bert, llama_linen
from lora_examples.hf_export import write_llama
from lora_examples.llama import LlamaConfig
from lora_torch import to_torch_state_dict

NICE = ["good", "fine", "lovely", "warm", "witty"]
POOR = ["bad", "dull", "awful", "cold", "silly"]
PLAIN = ["film", "plot", "the", "a", "is", "and", "actor", "scene", "music", "ending"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|endoftext|>"]

LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, rope_theta=1e4,
)  # fmt: skip


def tokenizer() -> Tokenizer:
    words = [*SPECIAL, *NICE, *POOR, *PLAIN]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def random_params(like: Any) -> Any:
    """Normal numbers of the size that keeps activations near one; norms start at one and biases at zero."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        kind = str(path[-1].key)
        if kind in ("scale", "bias"):
            return np.full(leaf.shape, float(kind == "scale"), np.float32)
        return (rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[-2])).astype(np.float32)

    return jax.tree.map_with_path(draw, like)


def write_bert(directory: Path) -> Path:
    """A Hugging Face directory of a random one-layer BERT without a head."""
    config = {
        "model_type": "bert", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 24, "max_position_embeddings": 16, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "architectures": ["BertModel"],
    }  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    model = bert.BertForSequenceClassification(bert.BertConfig.from_hf(config))
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]["bert"]
    params = random_params(like)
    save_file(to_torch_state_dict(params, preset="linen"), directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def write_reviews(path: Path, rows: int = 240) -> Path:
    """Sentences of ten words; the label says whether nine of them are nice or poor."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(rows):
            words = [*rng.choice(NICE if i % 2 else POOR, 9), *rng.choice(PLAIN, 1)]
            writer.writerow([" ".join(rng.permutation(words)), i % 2])
    return path


def write_tiny_llama(directory: Path) -> Path:
    """A Hugging Face directory of a random one-layer Llama."""
    write_llama(directory, LLAMA, random_params(llama_linen.abstract_params(LLAMA)), tokenizer())
    return directory


def write_text(path: Path, words: int = 3000) -> Path:
    """Words in an order that can be learnt: each is followed by one of two."""
    rng = np.random.default_rng(0)
    every = [*NICE, *POOR, *PLAIN]
    at, out = 0, []
    for step in rng.integers(1, 3, words):
        at = (at + int(step)) % len(every)
        out.append(every[at])
    path.write_text(" ".join(out))
    return path


def write_options(path: Path, **options: Any) -> Path:
    """A YAML file; dots in names nest: `**{"optim.steps": 3}`."""
    tree: dict[str, Any] = {}
    for name, value in options.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path.write_text(yaml.safe_dump(tree))
    return path


def write_classification(folder: Path, **options: Any) -> Path:
    """A directory with model, data and `options.yaml`, of which the path is returned."""
    own = {
        "task": "classification", "model.path": str(write_bert(folder / "bert")),
        "data.path": str(write_reviews(folder / "reviews.csv")), "data.length": 12, "data.batch_size": 16,
        "data.held_out": 20, "optim.steps": 12, "optim.lr": 0.02, "optim.warmup_steps": 2, "eval_every": 6,
        "checkpoint_every": 4, "verify": "never", "lora.rank": 4,
        "lora.target_modules": ["query", "value"], "lora.modules_to_save": ["classifier"],
    }  # fmt: skip
    return write_options(folder / "options.yaml", **{**own, **options})


def write_causal_lm(folder: Path, **options: Any) -> Path:
    own = {
        "task": "causal-lm", "model.path": str(write_tiny_llama(folder / "llama")),
        "data.path": str(write_text(folder / "text.txt")), "data.length": 16, "data.batch_size": 4,
        "data.held_out": 10, "optim.steps": 12, "optim.lr": 0.02, "optim.warmup_steps": 2, "eval_every": 6,
        "checkpoint_every": 4, "verify": "never", "sample.prompt": "good film", "sample.tokens": 4,
        "lora.target_modules": ["q_proj", "down_proj"],
    }  # fmt: skip
    return write_options(folder / "options.yaml", **{**own, **options})


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
