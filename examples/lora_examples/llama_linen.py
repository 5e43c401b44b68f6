"""Llama in Flax linen, with Hugging Face's parameter names and equal to its `LlamaForCausalLM`.

`params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]` is the transpose of what a torch state dict
calls `model.layers.0.self_attn.q_proj.weight`. The computation follows the dtype of the parameters: cast
those to bfloat16 for a bfloat16 model (norms, attention weights and rotations still run in float32).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lora_examples.llama import LlamaConfig, causal_attention


class SelfAttention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        config = self.config

        def project(heads: int, name: str) -> Float[Array, "batch length heads head"]:
            y = nn.Dense(heads * config.head_dim, use_bias=config.qkv_bias, name=name)(x)
            return y.reshape(*y.shape[:2], heads, config.head_dim)

        query = project(config.num_attention_heads, "q_proj")
        key = project(config.num_key_value_heads, "k_proj")
        value = project(config.num_key_value_heads, "v_proj")
        y = causal_attention(query, key, value, config)
        return nn.Dense(config.hidden_size, use_bias=config.o_bias, name="o_proj")(y)


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        config = self.config
        gate = nn.Dense(config.intermediate_size, use_bias=config.mlp_bias, name="gate_proj")(x)
        up = nn.Dense(config.intermediate_size, use_bias=config.mlp_bias, name="up_proj")(x)
        return nn.Dense(config.hidden_size, use_bias=config.mlp_bias, name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        x += SelfAttention(self.config, name="self_attn")(_norm(self.config, "input_layernorm")(x))
        return x + MLP(self.config, name="mlp")(_norm(self.config, "post_attention_layernorm")(x))


class Layers(nn.Module):
    """Exists for its name: it puts `layers.` before the layer's number."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        for index in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=str(index))(x)
        return x


class LlamaModel(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        self.embed_tokens = nn.Embed(self.config.vocab_size, self.config.hidden_size)
        self.layers = Layers(self.config)
        self.norm = nn.RMSNorm(epsilon=self.config.rms_norm_eps)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        return self.norm(self.layers(self.embed_tokens(tokens)))


class Llama(nn.Module):
    """The language model: `model.apply({"params": params}, tokens)` returns every next token's logits."""

    config: LlamaConfig

    def setup(self) -> None:
        self.model = LlamaModel(self.config)
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Dense(self.config.vocab_size, use_bias=False)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        x = self.model(tokens)
        return self.model.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)


def _norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.rms_norm_eps, name=name)


def abstract_params(config: LlamaConfig) -> dict[str, Any]:
    """The parameters' nested names and shapes as `jax.ShapeDtypeStruct`s; allocates nothing."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
