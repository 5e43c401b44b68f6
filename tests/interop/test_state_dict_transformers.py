"""Seven transformers model families, Flax and PyTorch, from one set of random weights: same names, same outputs."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "FlaxPreTrainedModel"):
    pytest.skip("transformers 5 has no Flax models", allow_module_level=True)

from lora_torch import Preset, StateDictError, from_torch_state_dict, to_torch_state_dict  # noqa: E402
from lora_torch.arrays import same_bits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Flax models are deprecated there, and say so often

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
)
GROUPED = dict(TEXT, num_key_value_heads=2)
PATCHES = dict(image_size=8, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2)


@dataclass(frozen=True)
class Case:
    """A model and two faults that its shapes cannot reveal: a square kernel left as it is, two tensors swapped."""

    model: str
    config: Callable[[], Any]
    wrong_layout: tuple[str, str]
    swapped: tuple[str, str]
    tied: Mapping[str, str] = field(default_factory=dict)
    pixels: int = 0

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(1)
        if self.pixels:
            return {"pixel_values": rng.normal(size=(2, 3, self.pixels, self.pixels)).astype(np.float32)}
        return {"input_ids": rng.integers(0, TEXT["vocab_size"], (2, 7))}


def llama_like(model: str, config: str, **more: Any) -> Case:
    layer = "model.layers.1."
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config == "GemmaConfig" else {}
    return Case(
        model,
        lambda: getattr(transformers, config)(**GROUPED, **more),
        (f"{layer}self_attn.q_proj.kernel", "same"),
        (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
        tied,
    )


CASES = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4),
        ("transformer.h.1.attn.c_proj.kernel", "same"),
        ("transformer.h.0.attn.c_proj.weight", "transformer.h.1.attn.c_proj.weight"),
        {"lm_head.weight": "transformer.wte.weight"},
    ),
    "llama": llama_like("LlamaForCausalLM", "LlamaConfig"),
    "mistral": llama_like("MistralForCausalLM", "MistralConfig"),
    "gemma": llama_like("GemmaForCausalLM", "GemmaConfig", head_dim=8),
    "bert": Case(
        "BertForMaskedLM",
        lambda: transformers.BertConfig(**TEXT),
        ("bert.encoder.layer.0.attention.self.query.kernel", "same"),
        ("bert.encoder.layer.0.attention.self.key.weight", "bert.encoder.layer.0.attention.self.query.weight"),
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    "bert_classifier": Case(
        "BertForSequenceClassification",
        lambda: transformers.BertConfig(**TEXT),
        ("bert.pooler.dense.kernel", "same"),
        ("bert.encoder.layer.0.output.LayerNorm.weight", "bert.encoder.layer.0.output.LayerNorm.bias"),
    ),
    "vit": Case(
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**PATCHES, num_attention_heads=4),
        ("vit.embeddings.patch_embeddings.projection.kernel", "h w i o -> o i w h"),
        ("vit.encoder.layer.1.layernorm_before.weight", "vit.encoder.layer.1.layernorm_after.weight"),
        pixels=8,
    ),
    "resnet": Case(
        "ResNetForImageClassification",
        lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        ("resnet.encoder.stages.0.layers.0.layer.layer_1.convolution.kernel", "h w i o -> o i w h"),
        (
            "resnet.encoder.stages.1.layers.0.layer.0.normalization.running_mean",
            "resnet.encoder.stages.1.layers.0.layer.0.normalization.running_var",
        ),
        pixels=16,
    ),
}


def random_like(shapes: Any, seed: int) -> Any:
    """Weights without zeros or repeated values; vectors (norms, biases, variances) positive."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        values = rng.normal(size=leaf.shape).astype(np.float32)
        return 0.5 + 0.5 * abs(values) if leaf.ndim == 1 else 0.2 * values

    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str) -> None:
    case = CASES[name]
    config, inputs = case.config(), case.inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flax_model = getattr(transformers, f"Flax{case.model}")(
            config, _do_init=False, **({"input_shape": (1, case.pixels, case.pixels, 3)} if case.pixels else {})
        )
        torch_model = getattr(transformers, case.model)(config).eval()
        shapes = jax.eval_shape(lambda key: flax_model.init_weights(key, flax_model.input_shape), jax.random.key(0))
        params = random_like(shapes, seed=0)
        want = np.asarray(jax.jit(lambda params: flax_model(**inputs, params=params)[0])(params))

    def outputs(state: dict[str, Any]) -> np.ndarray:
        torch_model.load_state_dict(state, strict=True)
        with torch.no_grad():
            return torch_model(**{key: torch.as_tensor(value) for key, value in inputs.items()})[0].numpy()

    def error(state: dict[str, Any]) -> float:
        return float(np.max(abs(outputs(state) - want)) / np.max(abs(want)))

    options: dict[str, Any] = dict(preset="hf-flax", tied=case.tied, kind="torch", copy=True)
    state = to_torch_state_dict(params, **options)
    theirs = {key for key in torch_model.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(state) == theirs
    assert error(state) <= 1e-5

    # Faults that every shape allows: the bound must see them.
    path, layout = case.wrong_layout
    assert error(to_torch_state_dict(params, layouts={path: layout}, **options)) > 1e-3
    one, other = case.swapped
    assert error({**state, one: state[other], other: state[one]}) > 1e-3

    torch_model.load_state_dict(state, strict=True)
    back = from_torch_state_dict(torch_model.state_dict(), shapes, preset="hf-flax", tied=case.tied)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(same_bits, params, back)))


def test_shapes_decide_all_but_square_kernels() -> None:
    """Without a preset a tensor's shape proves most layouts; what it cannot prove is asked for, by name."""
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    state = transformers.GPT2LMHeadModel(config).state_dict()
    flax_model = transformers.FlaxGPT2LMHeadModel(config, _do_init=False)
    shapes = jax.eval_shape(lambda key: flax_model.init_weights(key, (1, 1)), jax.random.key(0))
    own_names = Preset("own names", numbered_names=False)  # `ln_1` is a name here
    tied = {"lm_head.weight": "transformer.wte.weight"}
    with pytest.raises(
        StateDictError, match=r"c_proj.kernel \(32, 32\) could be 'i o -> o i' .* '... -> ...'"
    ) as caught:
        from_torch_state_dict(state, shapes, preset=own_names, tied=tied)
    assert caught.value.ambiguous == ("transformer.h.0.attn.c_proj.kernel",)
    assert not caught.value.missing and not caught.value.unexpected
    stated = {"**.attn.c_proj.kernel": "linear"}
    params = from_torch_state_dict(state, shapes, preset=own_names, tied=tied, layouts=stated)
    by_preset = from_torch_state_dict(state, shapes, preset="hf-flax", tied=tied)
    assert all(jax.tree.leaves(jax.tree.map(same_bits, params, by_preset)))


def test_base_model_gets_its_prefix_by_name() -> None:
    """A base model's weights under the names of a model with a head."""
    config = transformers.BertConfig(**TEXT)
    flax_model = transformers.FlaxBertModel(config, _do_init=False, add_pooling_layer=False)
    shapes = jax.eval_shape(lambda key: flax_model.init_weights(key, (1, 1)), jax.random.key(0))
    state = to_torch_state_dict(random_like(shapes, 0), preset="hf-flax", names={"**": "bert.**"})
    torch_names = transformers.BertForMaskedLM(config).state_dict()
    assert set(state) == {key for key in torch_names if key.startswith("bert.")}
