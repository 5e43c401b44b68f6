"""The linen transformer of Google's gemma package, at tiny configurations: raw parameters in Einsums.

The package imports TensorFlow (through kauldron), so no environment of this project has it. To run these tests,
install beside it, in a folder of their own and without their dependencies: gemma==3.3.0 kauldron==1.4.2
tensorflow-cpu==2.21.0 chex ml_collections lark immutabledict tabulate tqdm toolz contextlib2 typeguard astunparse
gast google-pasta flatbuffers opt_einsum termcolor six.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.third_party.check import RANK, Case, FrontEnd, Model, layers, random_params

PACKAGE = "gemma==3.3.0"
TOKENS = np.random.default_rng(0).integers(1, 50, (2, 7))


def _transformer(**settings: Any) -> Model:
    gm = importlib.import_module("gemma.gm")  # as a string: type checkers have no such package either
    attention = importlib.import_module("gemma.gm.nn._modules").AttentionType
    config = gm.nn.config.TransformerConfig(
        num_embed=50,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=8,
        attention_types=(attention.LOCAL_SLIDING, attention.GLOBAL),
        sliding_window_size=4,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        **settings,
    )
    module = gm.nn.Transformer(config=config, tokens="tokens", dtype=jnp.dtype("float32"))
    tokens = jnp.asarray(TOKENS)
    params = random_params(jax.eval_shape(module.init, jax.random.key(0), tokens)["params"])
    front = FrontEnd((tokens,), pick=lambda y: y.logits)
    return Model(module, params, lambda p, x: module.apply({"params": p}, x).logits, (tokens,), front)


def gemma2() -> Model:
    return _transformer(
        num_kv_heads=4, transpose_gating_einsum=True, attn_logits_soft_cap=50.0, final_logit_softcap=30.0
    )


def gemma3() -> Model:
    return _transformer(num_kv_heads=2, use_qk_norm=True, final_logit_softcap=None)


_COMMON = layers(2, "layer_{}.attn.attn_vec_einsum.w", "layer_{}.mlp.gating_einsum", "layer_{}.mlp.linear")
_TABLE = {"embedder.input_embedding": "embedding"}

CASES = [
    Case(
        "Gemma 2", PACKAGE, "linen", gemma2,
        linear=_COMMON | layers(2, "layer_{}.attn.qkv_einsum.w"),
        others=_TABLE,
        telling={
            "layer_0.attn.qkv_einsum.w": ("ooio", (32, RANK), (RANK, 3, 4, 8)),
            "layer_1.mlp.gating_einsum": ("ooi", (32, RANK), (RANK, 2, 48)),
        },
        note="gate and up are one (2, F, D) and share `lora_A`, query, key and value too; logits soft-capped",
    ),
    Case(
        "Gemma 3", PACKAGE, "linen", gemma3,
        linear=_COMMON | layers(2, "layer_{}.attn.q_einsum.w", "layer_{}.attn.kv_einsum.w"),
        others=_TABLE,
        telling={
            "layer_0.attn.kv_einsum.w": ("ooio", (32, RANK), (RANK, 2, 2, 8)),
            "layer_1.mlp.gating_einsum": ("oio", (32, RANK), (RANK, 2, 48)),
        },
        note="gate and up are one (2, D, F), keys and values one (2, heads, D, H)",
    ),
]  # fmt: skip
