"""Writes a Llama as a Hugging Face directory, for a model that came from another format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import save_file

from lora_examples.hf_directory import PathLike
from lora_examples.llama import LlamaConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"


def write_llama(directory: PathLike, config: LlamaConfig, params: Mapping[str, Any], tokenizer: "Tokenizer") -> None:
    """Writes `config.json`, `model.safetensors` and the tokenizer's files; `transformers` loads the result.

    **Arguments:** `directory` is made, with its parents; `params` as `gguf_weights.read_llama` returns them, of any
    dtype.

    **Raises:** `FileExistsError` if the directory exists; `ValueError` for a variant that a `LlamaForCausalLM` does
    not compute (biases on q, k and v alone, sliding windows, scaled rotary frequencies).
    """
    from lora_torch import to_torch_state_dict

    if config.qkv_bias != config.o_bias or config.sliding_window is not None or config.rope_scaling is not None:
        raise ValueError("Only plain Llama models are written; this one has biases, windows or scaled rotations.")
    state = to_torch_state_dict(params, preset="linen")
    directory = Path(directory)
    directory.mkdir(parents=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.token_to_id(END_OF_TEXT)
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": str(next(iter(state.values())).dtype),
    }
    _write_json(directory / "config.json", described)
    tokenizer.save(str(directory / "tokenizer.json"))
    marks = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if end is not None:
        marks |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    _write_json(directory / "tokenizer_config.json", marks)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
