"""The nnx models of google-tunix, at tiny configurations: kernels of three and four axes in its own Einsum."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.third_party.check import RANK, Case, FrontEnd, Model, layers, random_params

PACKAGE = "google-tunix==0.1.7"
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 7))
SMALL: dict[str, Any] = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8}
ROPE = {"vocab_size": 50, "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-5}


def with_random_params(build: Any) -> tuple[nnx.Module, Any, Any]:
    """`(model, its parameters, a function that rebuilds it)`; nothing is initialised by the package."""
    graphdef, shapes, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    params = random_params(shapes)
    model = nnx.merge(graphdef, params, rest)
    return model, nnx.state(model, nnx.Param), lambda p: nnx.merge(graphdef, p, rest)


def _decoder(build: Any) -> Model:
    model, params, rebuild = with_random_params(build)
    length = TOKENS.shape[1]
    position = jnp.broadcast_to(jnp.arange(length), TOKENS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(TOKENS), length, length))
    args = (jnp.asarray(TOKENS), position, None, mask)
    return Model(model, params, lambda p, *a: rebuild(p)(*a)[0], args, FrontEnd(args, pick=lambda y: y[0]))


def llama3(remat: str = "NONE", **settings: Any) -> Model:
    from tunix.models.llama3 import model as m

    config = m.ModelConfig(**SMALL, **ROPE, **settings, remat_config=m.RematConfig[remat])
    return _decoder(lambda: m.Llama3(config, rngs=nnx.Rngs(0)))


def qwen3(**settings: Any) -> Model:
    from tunix.models.qwen3 import model as m

    return _decoder(lambda: m.Qwen3(m.ModelConfig(**SMALL, **ROPE, **settings), rngs=nnx.Rngs(0)))


def gemma3(kv_heads: int) -> Model:
    from tunix.models.gemma3 import model as m

    config = m.ModelConfig(
        **SMALL, num_embed=50, num_kv_heads=kv_heads, sliding_window_size=4, param_dtype=jnp.dtype("float32")
    )
    return _decoder(lambda: m.Gemma3(config, rngs=nnx.Rngs(0)))


_ATTENTION = layers(2, *(f"layers.{{}}.attn.{name}_proj.w" for name in "qkvo"))
_MLP = layers(2, *(f"layers.{{}}.mlp.{name}_proj.kernel" for name in ("gate", "up", "down")))
_EXPERTS = layers(2, *(f"layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")))
_TABLE = {"embedder.input_embedding": "embedding"}
_HEADS = {
    "layers.0.attn.q_proj.w": ("ioo", (32, RANK), (RANK, 4, 8)),
    "layers.1.attn.o_proj.w": ("iio", (4, 8, RANK), (RANK, 32)),
}


def _gemma3_weights(*attention: str) -> frozenset[str]:
    return layers(2, "layers.{}.attn.attn_vec_einsum.w", *(f"layers.{{}}.attn.{a}.w" for a in attention)) | _MLP


CASES = [
    Case(
        "Llama 3", PACKAGE, "nnx", lambda: llama3(),
        linear=_ATTENTION | _MLP,
        others={**_TABLE, "lm_head.w": "linear"},
        telling=_HEADS,
        note="projections are (D, heads, H) and (heads, H, D)",
    ),
    Case(
        "Llama 3.2", PACKAGE, "nnx", lambda: llama3("DECODER", weight_tying=True),
        linear=_ATTENTION | _MLP,
        others=_TABLE,
        telling={"embedder.input_embedding": ("io", (50, RANK), (RANK, 32))},
        note="the head is the table's `.T`; `nnx.remat` around each layer",
    ),
    Case(
        "Qwen 3", PACKAGE, "nnx", lambda: qwen3(use_tied_embedding=True),
        linear=_ATTENTION | _MLP,
        others=_TABLE,
        telling=_HEADS,
        note="tied; query and key are normalised",
    ),
    Case(
        "Qwen 3 MoE", PACKAGE, "nnx", lambda: qwen3(num_experts=4, num_experts_per_tok=2),
        linear=_ATTENTION | _EXPERTS,
        others={**_TABLE, "lm_head.w": "linear"},
        left_out={f"layers.{i}.mlp.router.kernel": "a router (name it to adapt it)" for i in range(2)},
        telling={
            "layers.0.mlp.gate_proj": ("lio", (4, 32, RANK), (4, RANK, 48)),
            "layers.1.mlp.down_proj": ("lio", (4, 48, RANK), (4, RANK, 32)),
        },
        note="raw parameters (experts, D, F), a pair of factors for each expert; the router is left alone",
    ),
    Case(
        "Gemma 3", PACKAGE, "nnx", lambda: gemma3(kv_heads=2),
        linear=_gemma3_weights("q_einsum", "kv_einsum"),
        others=_TABLE,
        telling={
            "layers.0.attn.q_einsum.w": ("oio", (32, RANK), (RANK, 4, 8)),
            "layers.0.attn.kv_einsum.w": ("ooio", (32, RANK), (RANK, 2, 2, 8)),
            "layers.1.attn.attn_vec_einsum.w": ("iio", (4, 8, RANK), (RANK, 32)),
        },
        note="queries are (heads, D, H); keys and values are one (2, heads, D, H) and share `lora_A`",
    ),
    Case(
        "Gemma 3, one to one heads", PACKAGE, "nnx", lambda: gemma3(kv_heads=4),
        linear=_gemma3_weights("qkv_einsum"),
        others=_TABLE,
        telling={"layers.0.attn.qkv_einsum.w": ("ooio", (32, RANK), (RANK, 3, 4, 8))},
        note="query, key and value are one (3, heads, D, H) and share `lora_A`",
    ),
]  # fmt: skip
