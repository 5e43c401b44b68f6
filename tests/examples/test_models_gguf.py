"""GGUF files: written here from a torch Llama in llama.cpp's row order, and read back into the same logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_examples import gguf_weights, llama_linen

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CORPUS = ["The year 1999 was 365 days long, wasn't it?", "caf\u00e9 100% \n\t done  twice"] * 3


def train_tokenizer():
    """A byte-level BPE with SmolLM's splitting, trained by `tokenizers` itself."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: 0, h/2, 1, h/2 + 1, ... row by row, as its rotation pairs neighbours."""
    rows = weight.shape[0] // heads
    order = [head * rows + i + half for head in range(heads) for i in range(rows // 2) for half in (0, rows // 2)]
    return weight[order]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = train_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1000.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, tokenizer


def write(path, model, tokenizer, *, order=interleave, architecture="llama", quantise=None, pre="smollm") -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges(merges)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
    }
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if "q_proj" in name:
            array = order(array, config.num_attention_heads)
        if "k_proj" in name:
            array = order(array, config.num_key_value_heads)
        for torch_name, gguf_name in names.items():
            name = name.replace(torch_name, gguf_name)
        if quantise is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def worst(path, model) -> float:
    """The largest difference to torch's logits, over the largest logit."""
    config, params = gguf_weights.read_llama(gguf_weights.open_gguf(path))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17))
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    logits = jax.jit(llama_linen.Llama(config).apply)({"params": params}, jnp.asarray(tokens))
    return float(np.abs(np.asarray(logits) - want).max() / np.abs(want).max())


def test_weights_equal_torch(model_and_tokenizer, tmp_path):
    write(tmp_path / "right.gguf", *model_and_tokenizer)
    assert worst(tmp_path / "right.gguf", model_and_tokenizer[0]) < 2e-5
    # Rows that were not interleaved on writing come out wrong: the order is really undone.
    write(tmp_path / "wrong.gguf", *model_and_tokenizer, order=lambda weight, heads: weight)
    assert worst(tmp_path / "wrong.gguf", model_and_tokenizer[0]) > 1e-2


def test_quantised_weights_are_close(model_and_tokenizer, tmp_path):
    write(tmp_path / "q8.gguf", *model_and_tokenizer, quantise=gguf.GGMLQuantizationType.Q8_0)
    assert 1e-4 < worst(tmp_path / "q8.gguf", model_and_tokenizer[0]) < 3e-2


def test_tokenizer_is_rebuilt(model_and_tokenizer, tmp_path):
    model, original = model_and_tokenizer
    write(tmp_path / "t.gguf", model, original)
    tokenizer = gguf_weights.read_tokenizer(gguf_weights.open_gguf(tmp_path / "t.gguf"))
    for text in [*CORPUS[:2], "1234 unseen \u4e2d\u6587 it's", "a<|im_start|>b  c"]:
        ids = tokenizer.encode(text).ids
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|endoftext|>").ids == [0]
    assert len(tokenizer.encode("365").ids) == 3  # one token a digit


def test_other_files_are_refused(model_and_tokenizer, tmp_path):
    write(tmp_path / "a.gguf", *model_and_tokenizer, architecture="qwen2")
    with pytest.raises(ValueError, match="architecture is 'qwen2'"):
        gguf_weights.read_llama(gguf_weights.open_gguf(tmp_path / "a.gguf"))
    write(tmp_path / "b.gguf", *model_and_tokenizer, pre="llama-bpe")
    with pytest.raises(ValueError, match="'llama-bpe'"):
        gguf_weights.read_tokenizer(gguf_weights.open_gguf(tmp_path / "b.gguf"))
