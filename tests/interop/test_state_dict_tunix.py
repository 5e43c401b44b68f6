"""The "tunix" and "gemma" presets: tunix's NNX models and transformers' PyTorch models from one set of weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tunix.models.llama3.model", reason="pip install --no-deps google-tunix==0.1.7")

from lora_torch import StateDictError, from_torch_state_dict, to_torch_state_dict  # noqa: E402
from lora_torch.arrays import same_bits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = np.random.default_rng(0).integers(0, 50, (2, 7))
THEIRS: dict[str, Any] = dict(num_layers=1, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=8)
OURS: dict[str, Any] = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    head_dim=8,
    max_position_embeddings=32,
    rope_theta=1e6,  # tunix 0.1.7 rotates Llama 3 and Qwen 3 by this base whatever its config says
    attn_implementation="eager",
)
ROPE: dict[str, Any] = dict(vocab_size=50, num_kv_heads=2, rope_theta=1_000_000, norm_eps=1e-6)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def llama3() -> tuple[Any, Any]:
    from tunix.models.llama3 import model as m

    config = transformers.LlamaConfig(**OURS, num_key_value_heads=2, tie_word_embeddings=False)
    return m.Llama3(m.ModelConfig(**THEIRS, **ROPE, weight_tying=False), rngs=nnx.Rngs(0)), config


def qwen2() -> tuple[Any, Any]:
    from tunix.models.qwen2 import model as m

    config = transformers.Qwen2Config(**OURS, num_key_value_heads=2, tie_word_embeddings=True)
    return m.Qwen2(m.ModelConfig(**THEIRS, **ROPE, use_tied_embedding=True), rngs=nnx.Rngs(0)), config


def qwen3(experts: int) -> tuple[Any, Any]:
    from tunix.models.qwen3 import model as m

    if not experts:
        config = transformers.Qwen3Config(**OURS, num_key_value_heads=2, tie_word_embeddings=True)
        return m.Qwen3(m.ModelConfig(**THEIRS, **ROPE, use_tied_embedding=True), rngs=nnx.Rngs(0)), config
    sizes = dict(num_experts=experts, num_experts_per_tok=2)
    config = transformers.Qwen3MoeConfig(
        **OURS, **sizes, num_key_value_heads=2, moe_intermediate_size=48, norm_topk_prob=True
    )
    return m.Qwen3(m.ModelConfig(**THEIRS, **ROPE, **sizes), rngs=nnx.Rngs(0)), config


def gemma3(kv_heads: int) -> tuple[Any, Any]:
    from tunix.models.gemma3 import model as m

    config = transformers.Gemma3TextConfig(
        **OURS,
        num_key_value_heads=kv_heads,
        sliding_window=32,
        query_pre_attn_scalar=8,
        rope_local_base_freq=10_000.0,
        hidden_activation="gelu_pytorch_tanh",
    )
    theirs = m.ModelConfig(
        **THEIRS, num_embed=50, num_kv_heads=kv_heads, sliding_window_size=32, param_dtype=jnp.dtype("float32")
    )
    return m.Gemma3(theirs, rngs=nnx.Rngs(0)), config


@dataclass(frozen=True)
class Case:
    build: Callable[[], tuple[Any, Any]]
    twin: str
    swapped: tuple[str, str]
    tied: Mapping[str, str] = field(default_factory=dict)


UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
K, V = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
EXPERT = "model.layers.0.mlp.experts.{}.down_proj.weight"
CASES = {
    "llama3": Case(llama3, "LlamaForCausalLM", (K, V)),
    "qwen2": Case(qwen2, "Qwen2ForCausalLM", (K, V), TIED),
    "qwen3": Case(lambda: qwen3(0), "Qwen3ForCausalLM", (UP, GATE), TIED),
    "qwen3_experts": Case(lambda: qwen3(4), "Qwen3MoeForCausalLM", (EXPERT.format(0), EXPERT.format(1))),
    "gemma3_kv_einsum": Case(lambda: gemma3(2), "Gemma3ForCausalLM", (K, V), TIED),
    "gemma3_qkv_einsum": Case(lambda: gemma3(4), "Gemma3ForCausalLM", (K, V), TIED),
}


def random_like(shapes: Any) -> Any:
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        values = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(0.5 + 0.5 * abs(values) if leaf.ndim == 1 else 0.2 * values)

    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str) -> None:
    case = CASES[name]
    configs: list[Any] = []

    def build() -> Any:
        model, config = case.build()
        configs.append(config)
        return model

    graphdef, shapes, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    params = random_like(shapes)
    length = TOKENS.shape[1]
    position = jnp.broadcast_to(jnp.arange(length), TOKENS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (2, length, length))
    run = jax.jit(lambda params: nnx.merge(graphdef, params, rest)(jnp.asarray(TOKENS), position, None, mask)[0])
    want = np.asarray(run(params))
    twin = getattr(transformers, case.twin)(configs[0]).eval()

    def error(state: dict[str, Any]) -> float:
        twin.load_state_dict(state, strict=True)
        with torch.no_grad():
            got = twin(torch.as_tensor(TOKENS)).logits.numpy()
        return float(np.max(abs(got - want)) / np.max(abs(want)))

    options: dict[str, Any] = dict(preset="tunix", tied=case.tied)
    state = to_torch_state_dict(params, **options, kind="torch", copy=True)
    assert set(state) == set(twin.state_dict())
    assert error(state) <= 1e-5
    one, other = case.swapped
    assert error({**state, one: state[other], other: state[one]}) > 1e-3
    assert error({**state, V: state[V].flip(0)}) > 1e-3  # heads in another order

    twin.load_state_dict(state, strict=True)
    back = from_torch_state_dict(twin.state_dict(), shapes, **options)
    assert isinstance(back, nnx.State)
    assert all(jax.tree.leaves(jax.tree.map(same_bits, params, back)))


def test_gemma_preset() -> None:
    """Google's linen names carry the same arrays as tunix's, except for the MLP's, which it keeps fused."""
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: gemma3(2)[0]), nnx.Param))
    params = jax.tree.map(np.asarray, random_like(shapes))

    def fused(layer: dict[str, Any], transposed: bool) -> dict[str, Any]:
        halves = np.stack([layer["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up")])
        gating = halves.swapaxes(1, 2) if transposed else halves
        return {**layer, "mlp": {"gating_einsum": gating, "linear": layer["mlp"]["down_proj"]["kernel"]}}

    want = to_torch_state_dict(params, preset="tunix", tied=TIED)
    outer = {name: params[name] for name in ("embedder", "final_norm")}
    twin = {name: value.shape for name, value in want.items()}
    for transposed, layout in ((True, "s f d -> f d"), (False, "s d f -> f d")):
        google = {**outer, **{f"layer_{n}": fused(params["layers"][n], transposed) for n in range(1)}}
        with pytest.raises(StateDictError, match=r"layer_0.mlp.gating_einsum .* could be") as caught:
            to_torch_state_dict(google, preset="gemma", tied=TIED)
        assert caught.value.ambiguous == ("layer_0.mlp.gating_einsum",)
        for decided in ({"like": twin}, {"layouts": {"layer_*.mlp.gating_einsum": layout}}):
            got = to_torch_state_dict(google, preset="gemma", tied=TIED, **decided)
            assert got.keys() == want.keys() and all(same_bits(got[name], want[name]) for name in want)
        back = from_torch_state_dict(want, google, preset="gemma", tied=TIED)
        assert all(jax.tree.leaves(jax.tree.map(same_bits, google, back)))
