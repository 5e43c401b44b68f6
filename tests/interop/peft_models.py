"""Small models in Flax and PyTorch with the same random weights, for PEFT directories to travel between."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.adapters import expected_leaves
from lora_torch import to_torch_state_dict

IDS = np.random.default_rng(0).integers(0, 50, (2, 7))
# The bound, relative to the largest logit.
TOLERANCE = 1e-5

TEXT = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
)


@dataclass(frozen=True, eq=False)
class Twin:
    """A model on both sides: `fn(params, ids)` in JAX, `make()` for a new torch model of the same weights."""

    fn: Callable[[Any, Any], Any]
    params: Any
    make: Callable[[], Any]
    names: str = "hf-flax"

    def plan(self, config: lj.LoRAConfig) -> lj.Plan:
        return lj.plan(self.fn, self.params, jnp.asarray(IDS), config=config)

    def ours(self, plan: lj.Plan, adapter: lj.Adapter) -> np.ndarray:
        if plan.sites not in self._adapted:
            self._adapted[plan.sites] = jax.jit(lj.apply(self.fn, plan))
        return np.asarray(self._adapted[plan.sites](self.params, adapter, jnp.asarray(IDS)))

    @functools.cached_property
    def _adapted(self) -> dict[tuple[lj.Site, ...], Any]:
        return {}

    def plain(self, params: Any) -> np.ndarray:
        return np.asarray(self._jitted(params, jnp.asarray(IDS)))

    @functools.cached_property
    def base(self) -> np.ndarray:
        return self.plain(self.params)

    @functools.cached_property
    def _jitted(self) -> Any:
        return jax.jit(self.fn)


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def peft_logits(twin: Twin, directory: Path) -> np.ndarray:
    """What `PeftModel.from_pretrained` makes of a directory."""
    import peft

    return logits(peft.PeftModel.from_pretrained(twin.make(), directory))


def transformers_logits(twin: Twin, directory: Path) -> np.ndarray:
    """What `model.load_adapter` makes of a directory."""
    model = twin.make()
    model.load_adapter(str(directory))
    return logits(model)


def agree(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.abs(got - want).max() <= TOLERANCE * np.abs(want).max())


def random_adapter(plan: lj.Plan, seed: int = 0) -> lj.Adapter:
    """Every leaf random, so that each of them changes the output; `modules_to_save` too."""
    rng = np.random.default_rng(seed)
    dtype = plan.config.dtype
    shapes = expected_leaves(plan.sites)
    return lj.Adapter.from_leaves(
        {path: jnp.asarray(rng.normal(size=shape) * 0.3, dtype) for path, shape in shapes.items()}, plan.sites
    )


def _twin(flax_class: str, torch_class: str, config: Any, tied: dict[str, str], **more: Any) -> Twin:
    import torch
    import transformers

    with warnings.catch_warnings():  # of the end of Flax in transformers 5
        warnings.simplefilter("ignore")
        model = getattr(transformers, flax_class)(config, _do_init=False)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.25, x.dtype), dict(model.params_shape_tree)
    )
    module = model.module
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)

    def fn(p: Any, ids: Any) -> Any:
        return module.apply({"params": p}, ids, jnp.ones_like(ids), position_ids=positions, **more).logits

    state = to_torch_state_dict(params, preset="hf-flax", tied=tied, kind="torch")

    def make() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # PEFT changes the configuration of a model whose layers it repeats.
            twin = getattr(transformers, torch_class)(copy.deepcopy(config))
        missing, unexpected = twin.load_state_dict({k: torch.clone(v) for k, v in state.items()}, strict=False)
        assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
        return twin.eval()

    return Twin(fn, params, make)


def llama() -> Twin:
    """Grouped-query attention (two key-value heads of four) and an untied head."""
    import transformers

    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=False)
    return _twin("FlaxLlamaForCausalLM", "LlamaForCausalLM", config, {})


def gpt2() -> Twin:
    """Conv1D layers, whose kernels Flax stores (out, in), and a head tied to the embedding."""
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return _twin("FlaxGPT2LMHeadModel", "GPT2LMHeadModel", config, {"lm_head.weight": "transformer.wte.weight"})


def bert() -> Twin:
    """A sequence classifier: its head is trained in full."""
    import transformers

    config = transformers.BertConfig(**TEXT, num_labels=3)
    return _twin(
        "FlaxBertForSequenceClassification",
        "BertForSequenceClassification",
        config,
        {},
        token_type_ids=jnp.zeros_like(jnp.asarray(IDS)),
        head_mask=None,
    )


def gemma() -> Twin:
    """A tied head that PEFT knows to be tied, and an embedding that is scaled after its lookup."""
    import transformers

    config = transformers.GemmaConfig(**TEXT, num_key_value_heads=2, head_dim=8, hidden_act="gelu_pytorch_tanh")
    return _twin("FlaxGemmaForCausalLM", "GemmaForCausalLM", config, {"lm_head.weight": "model.embed_tokens.weight"})
