"""What can be said of the models without torch: the two Llamas agree, padding is ignored, sampling is fair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_examples import bert, llama_linen, llama_nnx
from lora_examples.generate import generator
from lora_examples.hf_directory import flax_params
from lora_examples.llama import LlamaConfig
from lora_torch import to_torch_state_dict

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
)


def random_like(tree, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), dtype), tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linen_and_nnx_agree(dtype):
    params = random_like(llama_linen.abstract_params(CONFIG), dtype)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 61, (2, 9)))
    linen = jax.jit(llama_linen.Llama(CONFIG).apply)({"params": params}, tokens)
    ours = nnx.jit(lambda model, tokens: model(tokens))(llama_nnx.from_params(CONFIG, params), tokens)
    assert linen.dtype == ours.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (linen, ours)), rtol=0, atol=1e-6)
    # Causal: what comes later changes nothing, what came before does.
    later = jax.jit(llama_linen.Llama(CONFIG).apply)({"params": params}, tokens.at[:, 5].add(1) % 61)
    difference = np.abs(np.asarray(later, np.float32) - np.asarray(linen, np.float32)).max(axis=(0, 2))
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()


def test_names_there_and_back():
    like = llama_linen.abstract_params(CONFIG)
    params = random_like(like)
    state = to_torch_state_dict(params, preset="hf-flax")
    assert state["model.layers.1.self_attn.k_proj.weight"].shape == (16, 48)
    assert "lm_head.weight" not in state
    back = flax_params(state, like)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    halves = flax_params(state, like, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(halves)} == {"bfloat16"}


def test_bert_ignores_padding():
    model = bert.BertForSequenceClassification(bert.BertConfig(67, 48, 2, 6, 80, 24))
    ids = jnp.asarray(np.random.default_rng(0).integers(1, 67, (3, 7)))
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    apply = jax.jit(model.apply)
    want = apply({"params": params}, ids)
    padded, mask = jnp.pad(ids, ((0, 0), (0, 4))), jnp.pad(jnp.ones_like(ids), ((0, 0), (0, 4)))
    np.testing.assert_allclose(apply({"params": params}, padded, mask), want, rtol=0, atol=1e-5)
    assert np.abs(apply({"params": params}, padded) - want).max() > 1e-3


def test_sampling_follows_the_softmax():
    table = jnp.array([0.3, -1.0, 2.0, 0.0, 1.5, -0.5])
    generate = generator(lambda table, tokens: jnp.broadcast_to(table, (*tokens.shape, 6)), 3001)
    expected = 3000 * np.asarray(jax.nn.softmax(table))

    def distance(temperature: float) -> float:
        """The chi-squared statistic of 3000 draws, with 5 degrees of freedom."""
        drawn = generate(table, [0], 3000, temperature=temperature, key=jax.random.key(0))
        return float(((np.bincount(drawn, minlength=6) - expected) ** 2 / expected).sum())

    assert distance(1.0) < 20  # exceeded once in 800 keys
    assert distance(0.8) > 40 and distance(1.25) > 40
    assert set(generate(table, [0], 50)) == {2}
