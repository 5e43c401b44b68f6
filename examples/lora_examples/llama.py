"""What the linen and the nnx Llama share: the configuration, and the two functions without parameters.

Sources: Touvron et al., arXiv:2302.13971; grouped queries: arXiv:2305.13245; rotary positions:
arXiv:2104.09864.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_torch.hf_checkpoint import check_sizes

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How a model trained on short texts stretches its rotary frequencies; `kind` is "linear" or "llama3"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The part of a Hugging Face `config.json` that decides the numbers; the defaults are SmolLM2-135M's."""

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100000.0
    rope_scaling: RotaryScaling | None = None
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the `config.json` of a Llama, Mistral or Qwen 2, as transformers 4 or 5 writes it.

        **Raises:** `ValueError` for another architecture, and for a variant that these files do not compute.
        """
        family = config.get("model_type", "llama")
        if family not in ("llama", "mistral", "qwen2"):
            raise ValueError(f"`model_type` is {family!r}; only llama, mistral and qwen2 are supported here.")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"`hidden_act` is {config['hidden_act']!r}; only 'silu' is supported here.")
        # transformers 5 moved the base and the scaling into one dictionary.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        windowed = family == "mistral" or (family == "qwen2" and config.get("use_sliding_window", False))
        if family == "qwen2" and windowed and config.get("max_window_layers", 0) > 0:
            raise ValueError("Sliding windows on a part of the layers (`max_window_layers`) are not supported.")
        check_sizes(config, _SIZES)
        bias = bool(config.get("attention_bias", False))
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=_rotary_scaling(rope),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            sliding_window=config.get("sliding_window") if windowed else None,
        )


def _rotary_scaling(rope: Mapping[str, Any]) -> RotaryScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"Rotary scaling of the kind {kind!r} is not supported here; 'linear' and 'llama3' are.")
    names = {field.name for field in dataclasses.fields(RotaryScaling)} & set(rope)
    return RotaryScaling(kind=kind, **{name: rope[name] for name in names})


def rotary_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half_head"]:
    """The angle, in radians per position, by which each pair of features turns. float32."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slow = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    # Llama 3.1: turns shorter than the original context stay, longer ones slow down, with a ramp between.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = np.clip(ramp, 0, 1).astype(np.float32)
    return (1 - ramp) * slow + ramp * frequencies


def rotate(x: Float[Array, "batch length heads head"], config: LlamaConfig) -> Float[Array, "..."]:
    """Turns feature i with feature i + head/2 by an angle proportional to the position. Computed in float32.

    This is the layout of Hugging Face's files. GGUF and llama2.c files pair neighbours, 2i with 2i+1, and
    keep the rows of their query and key weights in another order.
    """
    angles = jnp.arange(x.shape[1])[:, None] * rotary_frequencies(config)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]  # (length, 1, head/2)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def causal_attention(
    query: Float[Array, "batch length heads head"],
    key: Float[Array, "batch length kv_heads head"],
    value: Float[Array, "batch length kv_heads head"],
    config: LlamaConfig,
) -> Float[Array, "batch length heads_times_head"]:
    """Rotates query and key, and attends to the past: to `sliding_window` positions, itself included."""
    window = None if config.sliding_window is None else (config.sliding_window - 1, 0)
    y = jax.nn.dot_product_attention(
        rotate(query, config), rotate(key, config), value, is_causal=True, local_window_size=window
    )
    return y.reshape(*y.shape[:2], -1)
