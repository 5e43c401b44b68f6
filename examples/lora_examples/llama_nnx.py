"""Llama in Flax nnx, with Hugging Face's parameter names and equal to its `LlamaForCausalLM`.

`model.model.layers[0].self_attn.q_proj.kernel` is the transpose of what a torch state dict calls
`model.layers.0.self_attn.q_proj.weight`. The computation follows the dtype of the parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_examples.llama import LlamaConfig, causal_attention


class SelfAttention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nnx.Linear(config.hidden_size, queries, use_bias=config.qkv_bias, rngs=rngs)
        self.k_proj = nnx.Linear(config.hidden_size, keys, use_bias=config.qkv_bias, rngs=rngs)
        self.v_proj = nnx.Linear(config.hidden_size, keys, use_bias=config.qkv_bias, rngs=rngs)
        self.o_proj = nnx.Linear(queries, config.hidden_size, use_bias=config.o_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        def heads(y: Float[Array, "batch length features"]) -> Float[Array, "batch length heads head"]:
            return y.reshape(*y.shape[:2], -1, self.config.head_dim)

        query, key, value = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        return self.o_proj(causal_attention(query, key, value, self.config))


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.up_proj = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down_proj = nnx.Linear(inner, width, use_bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = _norm(config, rngs)
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.post_attention_layernorm = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        x += self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        # nnx.Embed, unlike nnx.Linear, settles on a dtype when it is made. None follows the parameters.
        self.embed_tokens.dtype = None
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = _norm(config, rngs)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Llama(nnx.Module):
    """The language model: `model(tokens)` returns the logits of every next token."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.model = LlamaModel(config, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        x = self.model(tokens)
        return self.model.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)


def from_params(config: LlamaConfig, params: Mapping[str, Any]) -> Llama:
    """Builds the model around parameters nested as the linen model's, without allocating any of its own.

    **Raises:** `ValueError` that lists missing, unexpected and misshapen parameters.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    given = {
        tuple(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params))
    }
    wanted = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    wrong = [
        f"{'.'.join(path)}: {getattr(given.get(path), 'shape', None)} given, "
        f"{getattr(wanted.get(path), 'shape', None)} wanted"
        for path in sorted(given.keys() | wanted.keys())
        if path not in given or path not in wanted or given[path].shape != wanted[path].shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} parameters do not fit the model:\n  " + "\n  ".join(wrong))
    filled = [(path, variable.replace(given[tuple(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))
