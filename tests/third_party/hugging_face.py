"""The Flax models of transformers 4.57 (the last with Flax), at tiny configurations."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.third_party.check import RANK, Case, FrontEnd, Model, layers, random_params

PACKAGE = "transformers==4.57.6"
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 7))
IMAGES = np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype(np.float32)
# Mistral's default would make a mask of 32768 x 32768.
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def _make(architecture: str, configuration: str, remat: bool = False, **settings: Any) -> Any:
    """An uninitialised model and random parameters of its shapes."""
    import transformers

    with warnings.catch_warnings():  # of the end of Flax in transformers 5
        warnings.simplefilter("ignore")
        config = getattr(transformers, configuration)(**settings)
        options: dict[str, Any] = {"input_shape": (1, 16, 16, 3)} if "Image" in architecture else {}
        if remat:
            options["gradient_checkpointing"] = True
        model = getattr(transformers, architecture)(config, _do_init=False, **options)
    return model, random_params(model.params_shape_tree)


def _text(architecture: str, configuration: str, **settings: Any) -> Model:
    model, params = _make(architecture, configuration, **settings)
    mask = jnp.ones(TOKENS.shape, jnp.int32).at[1, -2:].set(0)
    position = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    inner = {"input_ids": jnp.asarray(TOKENS), "attention_mask": mask, "position_ids": position}
    if "Bert" in architecture:
        types = jnp.asarray(TOKENS % 2)
        inner = {**inner, "token_type_ids": types, "head_mask": None}

        def fn(p: Any, ids: Any, mask: Any) -> Any:
            return model(ids, mask, token_type_ids=types, params=p).logits

    else:

        def fn(p: Any, ids: Any, mask: Any) -> Any:
            return model(ids, mask, params=p).logits

    front = FrontEnd(kwargs=inner, pick=lambda y: y.logits)
    return Model(model.module, params, fn, (jnp.asarray(TOKENS), mask), front)


def gpt2() -> Model:
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return _text("FlaxGPT2LMHeadModel", "GPT2Config", **sizes)


def llama() -> Model:
    return _text("FlaxLlamaForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=2)


def gemma() -> Model:
    extra = {"num_key_value_heads": 1, "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
    return _text("FlaxGemmaForCausalLM", "GemmaConfig", **SMALL, **extra)


def mistral() -> Model:
    return _text("FlaxMistralForCausalLM", "MistralConfig", **SMALL, num_key_value_heads=2, sliding_window=4)


def bert_masked() -> Model:
    return _text("FlaxBertForMaskedLM", "BertConfig", **SMALL)


def bert_classifier() -> Model:
    return _text("FlaxBertForSequenceClassification", "BertConfig", remat=True, **SMALL, num_labels=3)


def vit() -> Model:
    settings = {name: SMALL[name] for name in SMALL if name not in ("vocab_size", "max_position_embeddings")}
    model, params = _make(
        "FlaxViTForImageClassification", "ViTConfig", **settings, image_size=16, patch_size=8, num_labels=3
    )
    images = jnp.asarray(IMAGES)
    front = FrontEnd(args=(images.transpose(0, 2, 3, 1),), pick=lambda y: y.logits)
    return Model(model.module, params, lambda p, x: model(x, params=p).logits, (images,), front)


def resnet(layer_type: str) -> Model:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "num_labels": 3}
    model, variables = _make("FlaxResNetForImageClassification", "ResNetConfig", **sizes, layer_type=layer_type)
    images, stats = jnp.asarray(IMAGES), variables["batch_stats"]

    def fn(params: Any, stats: Any, x: Any) -> Any:
        return model(x, params={"params": params, "batch_stats": stats}).logits

    front = FrontEnd((images.transpose(0, 2, 3, 1),), variables={"batch_stats": stats}, pick=lambda y: y.logits)
    return Model(model.module, variables["params"], fn, (stats, images), front)


_DECODER = layers(
    2,
    *(f"model.layers.{{}}.self_attn.{name}_proj.kernel" for name in "qkvo"),
    *(f"model.layers.{{}}.mlp.{name}_proj.kernel" for name in ("gate", "up", "down")),
)


def _encoder(prefix: str, attention: str) -> frozenset[str]:
    names = [f"attention.{attention}.{name}" for name in ("query", "key", "value")]
    names += ["attention.output.dense", "intermediate.dense", "output.dense"]
    return layers(2, *(f"{prefix}.{{}}.{name}.kernel" for name in names))


_BERT_TABLES = {
    f"bert.embeddings.{name}_embeddings.embedding": "embedding" for name in ("word", "position", "token_type")
}


def _resnet_convolutions(*blocks: str) -> dict[str, str]:
    """Two stages of one and of two blocks; the first block of the second stage has a shortcut."""
    where = [f"{stage}.layers.{block}" for stage, block in ((0, 0), (1, 0), (1, 1))]
    names = [f"encoder.stages.{at}.layer.{block}" for at in where for block in blocks]
    names += ["embedder.embedder", "encoder.stages.1.layers.0.shortcut"]
    return {f"resnet.{name}.convolution.kernel": "conv" for name in names}


CASES = [
    Case(
        "GPT-2", PACKAGE, "linen", gpt2,
        linear=layers(
            2, *(f"transformer.h.{{}}.{m}.kernel" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
        ),
        others={"transformer.wte.embedding": "embedding", "transformer.wpe.embedding": "embedding"},
        telling={
            "transformer.h.0.attn.c_attn.kernel": ("oi", (32, RANK), (RANK, 96)),
            "transformer.h.1.mlp.c_proj.kernel": ("oi", (128, RANK), (RANK, 32)),
            "transformer.wte.embedding": ("io", (50, RANK), (RANK, 32)),
        },
        note="kernels are (out, in); the head is `wte` transposed, through a nested `.apply`",
    ),
    Case(
        "Llama", PACKAGE, "linen", llama,
        linear=_DECODER,
        others={"model.embed_tokens.embedding": "embedding", "lm_head.kernel": "linear"},
        telling={"model.layers.1.self_attn.k_proj.kernel": ("io", (32, RANK), (RANK, 16))},
        note="grouped-query attention",
    ),
    Case(
        "Gemma", PACKAGE, "linen", gemma,
        linear=_DECODER,
        others={"model.embed_tokens.embedding": "embedding"},
        telling={"model.layers.0.self_attn.v_proj.kernel": ("io", (32, RANK), (RANK, 8))},
        note="tied head; looked-up rows are scaled and normalised on their way to the first projections",
    ),
    Case(
        "Mistral", PACKAGE, "linen", mistral,
        linear=_DECODER,
        others={"model.embed_tokens.embedding": "embedding", "lm_head.kernel": "linear"},
        telling={"model.layers.0.mlp.down_proj.kernel": ("io", (48, RANK), (RANK, 32))},
        note="sliding window",
    ),
    Case(
        "BERT, masked LM", PACKAGE, "linen", bert_masked,
        linear=_encoder("bert.encoder.layer", "self") | {"cls.predictions.transform.dense.kernel"},
        others=_BERT_TABLES,
        telling={"bert.embeddings.word_embeddings.embedding": ("io", (50, RANK), (RANK, 32))},
        note="the decoder is the word table transposed, through a nested `.apply`",
    ),
    Case(
        "BERT, classifier", PACKAGE, "linen", bert_classifier,
        linear=_encoder("bert.encoder.layer", "self") | {"bert.pooler.dense.kernel"},
        others={**_BERT_TABLES, "classifier.kernel": "linear"},
        telling={"bert.embeddings.token_type_embeddings.embedding": ("io", (2, RANK), (RANK, 32))},
        note="gradient checkpointing: `nn.remat` around each layer",
    ),
    Case(
        "ViT", PACKAGE, "linen", vit,
        linear=_encoder("vit.encoder.layer", "attention"),
        others={"vit.embeddings.patch_embeddings.projection.kernel": "conv", "classifier.kernel": "linear"},
        left_out={
            "vit.embeddings.cls_token": "never contracted",
            "vit.embeddings.position_embeddings": "never contracted",
        },
        telling={"vit.embeddings.patch_embeddings.projection.kernel": ("iiio", (8, 8, 3, RANK), (RANK, 32))},
        note="patches by a strided convolution",
    ),
    Case(
        "ResNet, basic", PACKAGE, "linen", lambda: resnet("basic"),
        linear=frozenset({"classifier.1.kernel"}),
        others=_resnet_convolutions("layer_0", "layer_1"),
        telling={"resnet.embedder.embedder.convolution.kernel": ("iiio", (7, 7, 3, RANK), (RANK, 16))},
        note="BatchNorm statistics stay outside the parameters",
    ),
    Case(
        "ResNet, bottleneck", PACKAGE, "linen", lambda: resnet("bottleneck"),
        linear=frozenset({"classifier.1.kernel"}),
        others=_resnet_convolutions("0", "1", "2"),
        telling={"resnet.encoder.stages.1.layers.0.layer.1.convolution.kernel": ("iiio", (3, 3, 8, RANK), (RANK, 8))},
    ),
]  # fmt: skip
