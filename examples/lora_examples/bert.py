"""BERT with a classification head in Flax linen, equal to Hugging Face's `BertForSequenceClassification`.

Parameters carry the names of that model:
`params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]` holds what a torch state dict calls
`bert.encoder.layer.0.attention.self.query.*`. The computation follows the dtype of the parameters.

There is no dropout: an adapter of 0.3 % of the parameters needs none on the frozen body, and LoRA brings its
own.

Source: Devlin et al., arXiv:1810.04805.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lora_examples.hf_directory import PathLike, flax_params
from lora_torch.hf_checkpoint import check_sizes, open_checkpoint

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The part of a Hugging Face `config.json` that decides the numbers; the defaults are MiniLM-L6's."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    num_labels: int = 2

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, num_labels: int = 2) -> "BertConfig":
        """Reads a `config.json` dictionary. Raises `ValueError` for a variant that is not computed here."""
        expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for key, value in expected.items():
            if (found := config.get(key, value)) != value:
                raise ValueError(f"`{key}` is {found!r} in this config.json; only {value!r} is supported here.")
        check_sizes(config, [name for name in _SIZES if name in config])
        names = {field.name for field in dataclasses.fields(cls)} - {"num_labels"}
        return cls(**{name: config[name] for name in names if name in config}, num_labels=num_labels)


class Embeddings(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "batch length"], types: Int[Array, "batch length"]) -> Float[Array, "..."]:
        config = self.config
        x = nn.Embed(config.vocab_size, config.hidden_size, name="word_embeddings")(ids)
        positions = jnp.arange(ids.shape[1])[None]
        x += nn.Embed(config.max_position_embeddings, config.hidden_size, name="position_embeddings")(positions)
        x += nn.Embed(config.type_vocab_size, config.hidden_size, name="token_type_embeddings")(types)
        return _layer_norm(config)(x)


class SelfAttention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"], mask: Array) -> Float[Array, "batch length width"]:
        def project(name: str) -> Float[Array, "batch length heads head"]:
            y = nn.Dense(self.config.hidden_size, name=name)(x)
            return y.reshape(*y.shape[:2], self.config.num_attention_heads, -1)

        query, key, value = project("query"), project("key"), project("value")
        y = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return y.reshape(x.shape)


class Output(nn.Module):
    """A projection back to the hidden size, the residual connection, and the norm after it."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, residual: Array) -> Array:
        return _layer_norm(self.config)(nn.Dense(self.config.hidden_size, name="dense")(x) + residual)


class Attention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        return Output(self.config, name="output")(SelfAttention(self.config, name="self")(x, mask), x)


class Intermediate(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # The exact gelu, with erf; MiniLM was not trained with the tanh approximation.
        return nn.gelu(nn.Dense(self.config.intermediate_size, name="dense")(x), approximate=False)


class Layer(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        x = Attention(self.config, name="attention")(x, mask)
        return Output(self.config, name="output")(Intermediate(self.config, name="intermediate")(x), x)


class Layers(nn.Module):
    """Exists for its name: it puts `layer.` before the layer's number."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        for index in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=str(index))(x, mask)
        return x


class Encoder(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        return Layers(self.config, name="layer")(x, mask)


class Pooler(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return jnp.tanh(nn.Dense(self.config.hidden_size, name="dense")(x[:, 0]))


class Bert(nn.Module):
    """The encoder. Returns every token's hidden state, and the pooled state of the first (`[CLS]`)."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch length"], mask: Array | None = None, types: Array | None = None
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width"]]:
        mask = jnp.ones_like(ids) if mask is None else mask
        x = Embeddings(self.config, name="embeddings")(ids, jnp.zeros_like(ids) if types is None else types)
        # (batch, heads, queries, keys): padding is no key for anyone.
        x = Encoder(self.config, name="encoder")(x, mask[:, None, None, :] != 0)
        return x, Pooler(self.config, name="pooler")(x)


class BertForSequenceClassification(nn.Module):
    """Classifies a text by a linear head on the pooled `[CLS]` state.

    `model.apply({"params": params}, ids, mask)` takes token ids of shape (batch, length) and a mask of the
    same shape (1: a token, 0: padding; left out: all tokens), and returns logits of shape (batch,
    num_labels).
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch length"], mask: Array | None = None, types: Array | None = None
    ) -> Float[Array, "batch labels"]:
        _, pooled = Bert(self.config, name="bert")(ids, mask, types)
        return nn.Dense(self.config.num_labels, kernel_init=nn.initializers.zeros, name="classifier")(pooled)


def _layer_norm(config: BertConfig) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits that torch keeps.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name="LayerNorm")


def load(
    directory: PathLike, *, num_labels: int = 2, dtype: Any = None
) -> tuple[BertForSequenceClassification, dict[str, Any]]:
    """Reads a Hugging Face BERT directory, such as MiniLM's, and puts a classifier on it.

    **Arguments:**

    - `directory`: has `config.json` and `model.safetensors` (or a sharded set with its index).
    - `num_labels`: outputs of the classifier. A directory that has a classifier must agree; for one that has
        none (a bare `BertModel`, whose names lack the prefix `bert.`) the new classifier is zero.
    - `dtype`: what to cast the parameters to; `None` keeps the file's.

    **Returns:** the model, and its parameters.

    **Raises:** as `lora_torch.hf_checkpoint.open_checkpoint`; `ValueError` for an unsupported variant, and for missing,
    unexpected or misshapen tensors, which are all listed.
    """
    checkpoint = open_checkpoint(directory)
    config = BertConfig.from_hf(checkpoint.config, num_labels=num_labels)
    model = BertForSequenceClassification(config)
    state = checkpoint.state_dict()
    if not any(name.startswith("bert.") for name in state):
        state = {f"bert.{name}": array for name, array in state.items()}
    if not any(name.startswith("classifier.") for name in state):
        file_dtype = next(iter(state.values())).dtype
        state["classifier.weight"] = np.zeros((num_labels, config.hidden_size), file_dtype)
        state["classifier.bias"] = np.zeros((num_labels,), file_dtype)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return model, flax_params(state, like, dtype=dtype)
