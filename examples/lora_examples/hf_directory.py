"""Reads a local Hugging Face model directory: `config.json` and safetensors, in one file or sharded."""

import os
from collections.abc import Mapping
from typing import Any

import jax

from lora_examples.llama import LlamaConfig
from lora_examples.llama_linen import abstract_params
from lora_torch import from_torch_state_dict
from lora_torch.hf_checkpoint import open_checkpoint

PathLike = str | os.PathLike[str]


def read_llama(directory: PathLike, *, dtype: Any = None) -> tuple[LlamaConfig, dict[str, Any]]:
    """Reads a Llama-family directory (Llama, Mistral, Qwen 2, SmolLM ...).

    **Arguments:**

    - `directory`: has `config.json`, and `model.safetensors` or `model.safetensors.index.json` with its
        shards.
    - `dtype`: what to cast the parameters to; `None` keeps the file's.

    **Returns:** the config and the parameters, for `llama_linen.Llama(config)` as they are, and for
    `llama_nnx.from_params(config, params)`.

    **Raises:** as `lora_torch.hf_checkpoint.open_checkpoint`; `ValueError` for an unsupported variant, and for missing,
    unexpected or misshapen tensors, which are all listed.
    """
    checkpoint = open_checkpoint(directory)
    config = LlamaConfig.from_hf(checkpoint.config)
    # transformers leaves a tied head out; other programs write it twice.
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else None
    return config, flax_params(checkpoint.state_dict(), abstract_params(config), dtype=dtype, tied=tied)


def flax_params(
    state: Mapping[str, Any], like: Mapping[str, Any], *, dtype: Any = None, tied: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Turns a torch state dict into the parameters of a model of this package, or of any that Hugging Face named.

    **Arguments:**

    - `state`: arrays under torch names.
    - `like`: nested dictionaries of arrays or `jax.ShapeDtypeStruct`s; its shapes are checked, its dtypes not.
    - `dtype`: what to cast to; `None` keeps the dtype of `state`.
    - `tied`: an alias that `state` may hold, and its source; they must agree.

    **Returns:** dictionaries nested as `like`, of `jax.Array`s.

    **Raises:** `lora_torch.StateDictError` (a `ValueError`) that lists all missing, unexpected and misshapen tensors.
    """
    if dtype is not None:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), like)
    return from_torch_state_dict(state, like, preset="hf-flax", tied=tied, dtype="like" if dtype else "stored")
