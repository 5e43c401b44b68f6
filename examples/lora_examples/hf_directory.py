"""Reads a local Hugging Face model directory: `config.json` and safetensors, in one file or sharded.

Flax and torch name the same numbers differently, by three rules: a Dense `kernel` is the transpose of a
`weight`, and a norm's `scale` and an Embed's `embedding` are a `weight` as they are. The models of this
package need no others, because their modules are named as Hugging Face names them.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (makes numpy, and with it safetensors, know bfloat16)
import numpy as np
from safetensors import safe_open

from lora_examples import llama_linen
from lora_examples.llama import LlamaConfig

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
    state = read_state_dict(directory)
    # Derived from the config; saved by transformers until 4.32.
    state = {name: array for name, array in state.items() if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in state:
        head = state.pop("lm_head.weight")
        if not np.array_equal(head, state.get("model.embed_tokens.weight", head)):
            raise ValueError(
                "config.json says `tie_word_embeddings: true`, but `lm_head.weight` differs from "
                "`model.embed_tokens.weight`. Set it to false if the head is its own matrix."
            )
    return config, flax_params(state, llama_linen.abstract_params(config), dtype=dtype)


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
            raise FileNotFoundError(
                f"{index} names the shard {shard}, which is not there. Download it again."
            )
        found = _read_file(directory / shard)
        listed = {name for name, file in shard_of.items() if file == shard}
        if difference := sorted(listed ^ set(found)):
            raise ValueError(f"{shard} and {index.name} disagree about the tensors {difference[:8]}.")
        state |= found
    return state


def _read_file(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def flax_params(state: Mapping[str, Any], like: Mapping[str, Any], *, dtype: Any = None) -> dict[str, Any]:
    """Turns a torch state dict into Flax parameters.

    **Arguments:**

    - `state`: arrays under torch names, dots between the parts.
    - `like`: nested dictionaries of arrays or `jax.ShapeDtypeStruct`s; its shapes are checked, its dtypes
        not.
    - `dtype`: what to cast to; `None` keeps the dtype of `state`.

    **Returns:** dictionaries nested as `like`, of `jax.Array`s.

    **Raises:** one `ValueError` that lists all missing, unexpected and misshapen tensors.
    """
    faults = []
    used = set()

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        *modules, kind = (str(key.key) for key in path)
        name = ".".join([*modules, "bias" if kind == "bias" else "weight"])
        used.add(name)
        if name not in state:
            faults.append(f"missing: {name}, shape {leaf.shape[::-1] if kind == 'kernel' else leaf.shape}")
            return leaf
        array = np.asarray(state[name])
        array = array.T if kind == "kernel" else array
        if array.shape != leaf.shape:
            faults.append(f"misshapen: {name} is {np.shape(state[name])}, which gives {kind} of {leaf.shape}")
            return leaf
        # Cast before the copy to the device, so that only one copy of the wanted size is made.
        return jnp.asarray(np.ascontiguousarray(array, dtype=dtype or array.dtype))

    params = jax.tree_util.tree_map_with_path(convert, dict(like))
    faults += [f"unexpected: {name}, shape {np.shape(state[name])}" for name in sorted(set(state) - used)]
    if faults:
        raise ValueError(f"{len(faults)} tensors do not fit the model:\n  " + "\n  ".join(faults))
    return params
