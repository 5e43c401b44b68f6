"""Literal tables for known families of Flax models. Each states facts that no shape could prove.

Extend one by passing `rules=` next to it, or make another: `Preset("mine", rules=(Rule(…), *LINEN.rules))`.
"""

from __future__ import annotations

from .layouts import CONV, CONV_TRANSPOSE, HEADS_BIAS, HEADS_FIRST, HEADS_IN, HEADS_OUT, LINEAR, SAME
from .rules import Preset, Rule

# Two-dimensional `kernel`s are (in, out); longer ones are convolutions from four axes on. A kernel of three axes is
# a 1-D convolution or a DenseGeneral, which only its name (flax's own attention) or a shape can tell.
_FLAX_KERNELS = (
    Rule("**.query.kernel", layout=HEADS_IN),
    Rule("**.key.kernel", layout=HEADS_IN),
    Rule("**.value.kernel", layout=HEADS_IN),
    Rule("**.out.kernel", layout=HEADS_OUT),
    Rule("**.query.bias", layout=HEADS_BIAS),
    Rule("**.key.bias", layout=HEADS_BIAS),
    Rule("**.value.bias", layout=HEADS_BIAS),
    Rule("**.kernel", layout=LINEAR),
    Rule("**.kernel", layout=(HEADS_IN, HEADS_OUT, HEADS_FIRST, CONV)),
)

# The modules of flax.linen. ConvTranspose is known by its automatic name; under another, state "conv_transpose".
LINEN = Preset("linen", rules=(Rule("**.ConvTranspose_*.kernel", layout=CONV_TRANSPOSE), *_FLAX_KERNELS))

# The modules of flax.nnx, whose lists already number their items: `conv_1` is a name, not an index.
NNX = Preset("nnx", rules=_FLAX_KERNELS, numbered_names=False)

# transformers' Flax models have PyTorch's names. Every 2-D kernel is the transpose of its tensor, GPT-2's included:
# there Flax keeps (out, in) and PyTorch's Conv1D (in, out). `wi_0` of T5 is a name in both.
HF_FLAX = Preset(
    "hf-flax",
    rules=(
        Rule("**.stages.*.layers.*.layer.layer_*.**", to="**.stages.*.layers.*.layer.*.**"),  # ResNet
        Rule("**.kernel", layout=LINEAR),
        Rule("**.kernel", layout=CONV),
    ),
    numbered_names=False,
    ignore=("**.position_ids", "**.rotary_emb.inv_freq"),
)


def _gemma_attention(layer: str) -> tuple[Rule, ...]:
    """The einsum kernels that Google's Gemma code and tunix share, to transformers' names."""
    attention = "model.layers.*.self_attn"
    q, k, v = (f"{attention}.{x}_proj.weight" for x in "qkv")
    return (
        Rule(f"{layer}.attn.q_einsum.w", to=q, layout=HEADS_FIRST),
        Rule(f"{layer}.attn.kv_einsum.w", to=(k, v), layout="s k d h -> (k h) d"),
        Rule(f"{layer}.attn.qkv_einsum.w", to=(q, k, v), layout="s n d h -> (n h) d"),
        Rule(f"{layer}.attn.attn_vec_einsum.w", to=f"{attention}.o_proj.weight", layout=HEADS_OUT),
        Rule(f"{layer}.attn._query_norm.scale", to=f"{attention}.q_norm.weight"),
        Rule(f"{layer}.attn._key_norm.scale", to=f"{attention}.k_norm.weight"),
        # Gemma 2 and 3. Gemma 1 has two norms only, and transformers calls its pre_ffw_norm
        # post_attention_layernorm: rename it there.
        Rule(f"{layer}.pre_attention_norm.scale", to="model.layers.*.input_layernorm.weight"),
        Rule(f"{layer}.post_attention_norm.scale", to="model.layers.*.post_attention_layernorm.weight"),
        Rule(f"{layer}.post_attn_norm.scale", to="model.layers.*.post_attention_layernorm.weight"),
        Rule(f"{layer}.pre_ffw_norm.scale", to="model.layers.*.pre_feedforward_layernorm.weight"),
        Rule(f"{layer}.post_ffw_norm.scale", to="model.layers.*.post_feedforward_layernorm.weight"),
    )


_OUTER = (
    Rule("embedder.input_embedding", to="model.embed_tokens.weight", layout=SAME),
    Rule("final_norm.scale", to="model.norm.weight"),
)

_EXPERT = "model.layers.*.mlp.experts.{e}"

# google-tunix 0.1.7 (Llama 3, Qwen 2 and 3 with its experts, Gemma 2 and 3) to transformers' names.
TUNIX = Preset(
    "tunix",
    rules=(
        *_OUTER,
        Rule("final_norm.w", to="model.norm.weight"),
        Rule("lm_head.w", to="lm_head.weight", layout=LINEAR),
        *(
            Rule(f"layers.*.attn.{x}_proj.w", to=f"model.layers.*.self_attn.{x}_proj.weight", layout=HEADS_IN)
            for x in "qkv"
        ),
        Rule("layers.*.attn.o_proj.w", to="model.layers.*.self_attn.o_proj.weight", layout=HEADS_OUT),
        *(Rule(f"layers.*.attn.{x}_bias", to=f"model.layers.*.self_attn.{x}_proj.bias") for x in "qkv"),
        *(Rule(f"layers.*.attn.{x}_norm.w", to=f"model.layers.*.self_attn.{x}_norm.weight") for x in "qk"),
        Rule("layers.*.input_layernorm.w", to="model.layers.*.input_layernorm.weight"),
        Rule("layers.*.post_attention_layernorm.w", to="model.layers.*.post_attention_layernorm.weight"),
        *_gemma_attention("layers.*"),
        Rule("layers.*.mlp.router.kernel", to="model.layers.*.mlp.gate.weight", layout=LINEAR),
        Rule("layers.*.mlp.gate_proj", to=f"{_EXPERT}.gate_proj.weight", layout="e d f -> f d"),
        Rule("layers.*.mlp.up_proj", to=f"{_EXPERT}.up_proj.weight", layout="e d f -> f d"),
        Rule("layers.*.mlp.down_proj", to=f"{_EXPERT}.down_proj.weight", layout="e f d -> d f"),
        Rule("layers.*.mlp.*.kernel", to="model.layers.*.mlp.*.weight", layout=LINEAR),
    ),
    numbered_names=False,
)

# Google's gemma 3.3.0 (linen) to transformers' names. The two halves of `gating_einsum` are (hidden, features) or
# (features, hidden) by a flag of the model's config: only the shape of a PyTorch tensor can tell.
GEMMA = Preset(
    "gemma",
    rules=(
        *_OUTER,
        *_gemma_attention("layer_*"),
        Rule(
            "layer_*.mlp.gating_einsum",
            to=("model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"),
            layout=("s f d -> f d", "s d f -> f d"),
        ),
        Rule("layer_*.mlp.linear", to="model.layers.*.mlp.down_proj.weight", layout=LINEAR),
    ),
)

PRESETS = {preset.name: preset for preset in (LINEN, NNX, HF_FLAX, TUNIX, GEMMA)}
