"""Reads a Llama in llama.cpp's GGUF format: configuration, dequantised weights and tokenizer in one file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` does the parsing and the
dequantising (`pip install "lora-jax[demo]"`).
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_examples.hf_directory import PathLike, flax_params
from lora_examples.llama import LlamaConfig
from lora_examples.llama_linen import abstract_params
from lora_torch import rotary_to_half

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: PathLike) -> "GGUFReader":
    """Maps a GGUF file into memory, to read it with the functions below.

    **Raises:** `ValueError` if it is damaged or is no GGUF file; `OSError` if it cannot be opened.
    """
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # the library parses by numpy, and fails in any way whatever
        raise ValueError(f"{path} is damaged or is no GGUF file: {error}") from error


def read_llama(reader: "GGUFReader", *, dtype: Any = np.float32) -> tuple[LlamaConfig, dict[str, Any]]:
    """Returns the config and the parameters, as `hf_directory.read_llama` does.

    **Raises:** `ValueError` for another architecture, for rotary scaling, and for tensors that do not fit.
    """
    from gguf import dequantize

    config = read_config(reader)
    state = {}
    for tensor in reader.tensors:
        name = _torch_name(tensor.name)
        # GGUF writes shapes fastest axis first; the data are already (out, in), as torch has them.
        weight = dequantize(tensor.data, tensor.tensor_type)
        # llama.cpp rotates feature 2i with 2i+1 of a head, these models i with i + head/2. Without this logits are
        # wrong, and an adapter trained here would be exported for rows that mean something else.
        if name.endswith(".q_proj.weight"):
            weight = rotary_to_half(weight, config.num_attention_heads)
        elif name.endswith(".k_proj.weight"):
            weight = rotary_to_half(weight, config.num_key_value_heads)
        state[name] = weight
    return config, flax_params(state, abstract_params(config), dtype=dtype)


def read_config(reader: "GGUFReader") -> LlamaConfig:
    """Reads the metadata. Raises `ValueError` for what `LlamaConfig` cannot describe."""
    if (architecture := _field(reader, "general.architecture")) != "llama":
        raise ValueError(
            f"The architecture is {architecture!r}. Only 'llama' is read: others order q and k differently."
        )
    names = {tensor.name for tensor in reader.tensors}
    if _field(reader, "llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        raise ValueError("This file scales its rotary frequencies, which is not read. Use the safetensors.")
    heads = _field(reader, "llama.attention.head_count")
    width = _field(reader, "llama.embedding_length")
    return LlamaConfig(
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=width,
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv", heads),
        head_dim=_field(reader, "llama.rope.dimension_count", width // heads),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=_field(reader, "llama.rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in names,
    )


def read_tokenizer(reader: "GGUFReader") -> "Tokenizer":
    """Rebuilds SmolLM's tokenizer: byte-level BPE after splitting numbers into digits.

    **Raises:** `ValueError` for a vocabulary of another kind, which would need other splitting rules.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (_field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre", "default"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"The tokenizer is {kind}; only ('gpt2', 'smollm') is rebuilt here.")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the token type of <|endoftext|>, <|im_start|> ...; 1 is an ordinary token
    types = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _torch_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)) and match[2] in _BLOCK:
        return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.weight"
    raise ValueError(f"Tensor `{name}` is not part of a Llama as these models know it.")


_REQUIRED = object()


def _field(reader: "GGUFReader", name: str, default: Any = _REQUIRED) -> Any:
    field = reader.get_field(name)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise ValueError(f"The GGUF file has no field `{name}`.")
    return default
