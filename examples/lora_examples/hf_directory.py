"""Reads a local Hugging Face model directory: `config.json` and safetensors, in one file or sharded."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (makes numpy, and with it safetensors, know bfloat16)
import numpy as np
from safetensors import safe_open

from lora_examples.llama import LlamaConfig
from lora_examples.llama_linen import abstract_params
from lora_torch import from_torch_state_dict

PathLike = str | os.PathLike[str]


def read_llama(directory: PathLike, *, dtype: Any = None) -> tuple[LlamaConfig, dict[str, Any]]:
    """Reads a Llama-family directory (Llama, Mistral, Qwen 2, SmolLM ...).

    **Arguments:**

    - `directory`: has `config.json`, and `model.safetensors` or `model.safetensors.index.json` with its
        shards.
    - `dtype`: what to cast the parameters to; `None` keeps the file's.

    **Returns:** the config and the parameters, for `llama_linen.Llama(config)` as they are, and for
    `llama_nnx.from_params(config, params)`.

    **Raises:** `ValueError` for an unsupported variant, and for missing, unexpected or misshapen tensors,
    which are all listed.
    """
    config = LlamaConfig.from_hf(read_config(directory))
    # transformers leaves a tied head out; other programs write it twice.
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else None
    return config, flax_params(read_state_dict(directory), abstract_params(config), dtype=dtype, tied=tied)


def read_config(directory: PathLike) -> dict[str, Any]:
    """Returns `config.json` as a dictionary. Raises `FileNotFoundError`, or `ValueError` if it is none."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a Hugging Face model directory has a config.json.")
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object.")
    return config


def read_state_dict(directory: PathLike) -> dict[str, np.ndarray]:
    """Returns every tensor of a directory under its torch name, bfloat16 as `ml_dtypes.bfloat16`.

    **Raises:** `FileNotFoundError` when there are no safetensors or a shard is missing; `ValueError` when the
    index and the shards disagree.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"{directory} has neither model.safetensors nor {index.name}. Pickled weights "
                f"(pytorch_model.bin) are not read here: save the model with `safe_serialization=True`."
            )
        return _read_file(directory / "model.safetensors")

    shard_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
    state: dict[str, np.ndarray] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}, which is outside its directory.")
        if not (directory / shard).is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which is not there. Download it again.")
        found = _read_file(directory / shard)
        listed = {name for name, file in shard_of.items() if file == shard}
        if difference := sorted(listed ^ set(found)):
            raise ValueError(f"{shard} and {index.name} disagree about the tensors {difference[:8]}.")
        state |= found
    return state


def _read_file(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


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
