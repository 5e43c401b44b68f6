"""The linen and the nnx Llama against torch's, through directories that transformers itself writes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_examples import hf_directory, llama_linen, llama_nnx
from lora_examples.generate import generator
from lora_examples.llama import LlamaConfig
from lora_torch import StateDictError
from lora_torch.hf_checkpoint import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name -> transformers' class of config, its options, and an edit of our config that must change the logits.
CASES = {
    "grouped": ("LlamaConfig", {}, {"rope_theta": 5e3}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}, {"rms_norm_eps": 1e-2}),
    "wide_heads": ("LlamaConfig", {"head_dim": 16, "rope_theta": 500.0}, {"rope_theta": 1e4}),
    "biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, {"rope_theta": 5e3}),
    "llama3_rope": ("LlamaConfig", {"rope_scaling": LLAMA3, "rope_theta": 100.0}, {"rope_scaling": None}),
    "linear_rope": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"rope_scaling": None}),
    "mistral_window": ("MistralConfig", {"sliding_window": 5}, {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", {"rope_theta": 300.0}, {"rope_theta": 1e4}),
}


def save_torch_model(config_class: str, options: dict, directory, **save_options):
    """A random torch model, saved by transformers; every parameter is random, norms and biases too."""
    config = getattr(transformers, config_class)(**(SIZES | options))
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(directory, **save_options)
    return model


def tokens_and_logits(model, shape=(2, 23)) -> tuple[jax.Array, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], shape)
    with torch.no_grad():
        return jnp.asarray(tokens, jnp.int32), model(torch.tensor(tokens)).logits.float().numpy()


def linen_logits(config: LlamaConfig, params, tokens) -> np.ndarray:
    return np.asarray(jax.jit(llama_linen.Llama(config).apply)({"params": params}, tokens))


def nnx_logits(config: LlamaConfig, params, tokens) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(llama_nnx.from_params(config, params), tokens))


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, tmp_path):
    config_class, options, edit = CASES[case]
    tokens, want = tokens_and_logits(save_torch_model(config_class, options, tmp_path))
    config, params = hf_directory.read_llama(tmp_path)
    bound = 2e-5 * np.abs(want).max()
    np.testing.assert_allclose(linen_logits(config, params, tokens), want, rtol=0, atol=bound)
    np.testing.assert_allclose(nnx_logits(config, params, tokens), want, rtol=0, atol=bound)
    # What the case is about is noticed when it is not computed.
    other = dataclasses.replace(config, **edit)
    assert other != config
    assert np.abs(linen_logits(other, params, tokens) - want).max() > 20 * bound


def test_sharded_bfloat16_directory(tmp_path):
    model = save_torch_model("LlamaConfig", {}, tmp_path / "one").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    config, params = hf_directory.read_llama(tmp_path / "many")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}

    # In float32 the rounded weights give torch's float32 logits; in bfloat16, logits within its rounding.
    # (The saved model is read again: casting the one at hand has rounded its rotary frequencies too.)
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32)
    tokens, want = tokens_and_logits(reread.eval())
    _, exact = hf_directory.read_llama(tmp_path / "many", dtype=jnp.float32)
    bound = 2e-5 * np.abs(want).max()
    np.testing.assert_allclose(linen_logits(config, exact, tokens), want, rtol=0, atol=bound)
    for logits in (linen_logits(config, params, tokens), nnx_logits(config, params, tokens)):
        assert logits.dtype == jnp.bfloat16
        error = np.abs(np.asarray(logits, np.float32) - want).max() / np.abs(want).max()
        assert 1e-5 < error < 0.03

    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    next((tmp_path / "many").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        hf_directory.read_llama(tmp_path / "many")
    index["weight_map"]["lm_head.weight"] = "../one/model.safetensors"
    (tmp_path / "many/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not the name of a shard"):
        hf_directory.read_llama(tmp_path / "many")


def test_names_are_those_of_torch(tmp_path):
    model = save_torch_model("LlamaConfig", {}, tmp_path)
    config, params = hf_directory.read_llama(tmp_path)
    kinds = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

    def names(paths) -> set[str]:
        return {".".join([*map(str, path[:-1]), kinds[path[-1]]]) for path in paths}

    wanted = set(model.state_dict())
    linen = [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert names(linen) == wanted
    nnx_model = llama_nnx.from_params(config, params)
    assert names(path for path, _ in nnx.to_flat_state(nnx.state(nnx_model, nnx.Param))) == wanted
    # No copy: the nnx model holds the very arrays that were read.
    kernel = nnx_model.model.layers[1].mlp.up_proj.kernel
    assert kernel.get_value() is params["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"]


def test_all_tensors_that_do_not_fit_are_listed(tmp_path):
    save_torch_model("LlamaConfig", {}, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    state, config = checkpoint.state_dict(), LlamaConfig.from_hf(checkpoint.config)
    like = llama_linen.abstract_params(config)
    state["model.extra.weight"] = state.pop("lm_head.weight")
    state["model.norm.weight"] = state["model.norm.weight"][:7]
    with pytest.raises(StateDictError) as error:
        hf_directory.flax_params(state, like)
    assert error.value.missing == ("lm_head.weight",)
    assert error.value.unexpected == ("model.extra.weight",)
    assert error.value.misshapen == ("model.norm.weight",)

    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    params["model"]["bogus"] = params.pop("lm_head")
    with pytest.raises(ValueError, match=r"(?s)2 parameters.*lm_head.kernel: None given.*model.bogus.kernel"):
        llama_nnx.from_params(config, params)


def test_tied_head_that_differs_is_refused(tmp_path):
    save_torch_model("LlamaConfig", {}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="lm_head.weight and model.embed_tokens.weight differ"):
        hf_directory.read_llama(tmp_path)


@pytest.mark.parametrize(
    "edit,message",
    [
        ({"model_type": "gemma"}, "`model_type` is 'gemma'"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}, "max_window_layers"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple"),
    ],
)
def test_unsupported_variants_are_refused(edit, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(SIZES | edit)


def test_config_of_transformers_5():
    new = SIZES | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3}
    old = SIZES | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    assert LlamaConfig.from_hf(new) == LlamaConfig.from_hf(old) != LlamaConfig.from_hf(SIZES)


def test_generation(tmp_path):
    model = save_torch_model("LlamaConfig", {"num_hidden_layers": 1}, tmp_path)
    config, params = hf_directory.read_llama(tmp_path)
    linen = llama_linen.Llama(config)
    traces = []

    def logits_fn(params, tokens):
        traces.append(tokens.shape)
        return linen.apply({"params": params}, tokens)

    generate = generator(logits_fn, 20)
    for prompt in ([5, 9, 2], [11]):
        want = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert generate(params, prompt, 8) == want[0, len(prompt) :].tolist()
    assert traces == [(1, 20)] * len(traces) and len(traces) <= 2  # compiled once, whatever the prompt

    graph, state = nnx.split(llama_nnx.from_params(config, params))
    nnx_generate = generator(lambda state, tokens: nnx.merge(graph, state)(tokens), 20)
    greedy = generate(params, [5, 9, 2], 8)
    assert nnx_generate(state, [5, 9, 2], 8) == greedy

    stopping = generator(logits_fn, 20, stop=greedy[3])
    assert stopping(params, [5, 9, 2], 8) == greedy[: greedy.index(greedy[3])]

    for arguments, message in [(([], 3), "prompt is empty"), (([1], 20), "buffer of 20")]:
        with pytest.raises(ValueError, match=message):
            generate(params, *arguments)
    with pytest.raises(ValueError, match="positive with a `key`"):
        generate(params, [1], 2, temperature=0.7)
