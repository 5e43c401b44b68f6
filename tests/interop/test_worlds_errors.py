"""What does not fit between two worlds is named, with the way out, and nothing is changed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import lora_jax as lj  # noqa: E402
from lora_torch import (  # noqa: E402
    TuneDecoder,
    adapter_from_torch,
    adapter_to_torch,
    load_torch_adapter,
    to_torch_state_dict,
    translate,
)
from lora_torch import torchtune as tt  # noqa: E402
from lora_torch.live_models import dialect_of  # noqa: E402
from tests.interop.worlds import (  # noqa: E402
    ALPHA,
    CONFIG,
    PARAMS,
    PLAN,
    RANK,
    WORLDS,
    TorchModel,
    random_adapter,
    torch_model,
)

each_world = pytest.mark.parametrize("world", WORLDS)
ADAPTER = random_adapter(1)


@each_world
@pytest.mark.parametrize(
    "rank,alpha,what",
    [
        (RANK, 4.0, r"layers.0.up has the scale 2 in the torch model and 1.5 in JAX: use the same rank and alpha"),
        (4, 6.0, r"layers.0.up.lora_[aA].*\(4, 6\)(.|\n)*\(2, 6\)"),  # the same scale at another rank
    ],
)
def test_another_scale_or_rank(world: Any, rank: int, alpha: float, what: str) -> None:
    model = torch_model(world, rank, alpha)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (lambda: load_torch_adapter(model, ADAPTER), lambda: adapter_from_torch(model, PLAN)):
        with pytest.raises(
            ValueError, match=what if call.__code__.co_names[0] == "load_torch_adapter" else "layers.0.up"
        ):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@each_world
def test_modules_of_one_side_only(world: Any) -> None:
    config = lj.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=["up", "head"])
    plan = lj.plan(lambda p, x: TWIN(p, x), PARAMS, jnp.ones((2, 6)), config=config)
    with pytest.raises(ValueError) as failure:
        load_torch_adapter(torch_model(world), random_adapter(1, plan))
    assert "head is adapted in JAX, not in the torch model" in str(failure.value)
    assert "layers.1.down is adapted in the torch model, not in JAX" in str(failure.value)
    with pytest.raises(
        ValueError, match="layers_0.down is adapted in JAX, not in the torch model; nearest: layers.0.do"
    ):
        load_torch_adapter(torch_model(world), ADAPTER, names="nnx")
    state = adapter_to_torch(ADAPTER, world)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="layers.0.down: no lora_A, for `layers_0.down.kernel`"):
        adapter_from_torch(state, PLAN, world)


def TWIN(params: Any, x: Any) -> Any:
    from tests.interop.worlds import fn

    return fn(params, x)


def test_models_without_adapters_or_with_several_kinds() -> None:
    model = TorchModel()
    with pytest.raises(ValueError, match="the torch model has no adapter"):
        load_torch_adapter(model, ADAPTER)
    with pytest.raises(ValueError, match=r"no adapter \('other', in PEFT\)"):
        load_torch_adapter(torch_model("peft"), ADAPTER, adapter_name="other")
    both: Any = torch.nn.ModuleList([torch_model("peft"), torch_model("torchtune")])
    with pytest.raises(ValueError, match=r"adapters of several kinds, \['peft', 'torchtune'\]"):
        dialect_of(both)
    with pytest.raises(ValueError, match="say the `dialect` of a state dict"):
        adapter_from_torch(torch_model("peft").state_dict(), PLAN)
    with pytest.raises(ValueError, match="`dialect='lora'`, but the model's adapters are 'torchtune'"):
        adapter_from_torch(torch_model("torchtune"), PLAN, "lora")


def test_dora_on_one_side_only() -> None:
    plan = lj.plan(TWIN, PARAMS, jnp.ones((2, 6)), config=CONFIG.replace(use_dora=True))
    plain, dora = torch_model("lora"), torch_model("lora", dora=True)
    for call in (lambda: load_torch_adapter(dora, ADAPTER), lambda: adapter_from_torch(dora, PLAN)):
        with pytest.raises(ValueError, match="layers.0.up has a DoRA magnitude in the torch model, and none in JAX"):
            call()
    with pytest.raises(ValueError, match="the torch model has no parameter layers.0.down.lora_magnitude"):
        load_torch_adapter(plain, random_adapter(1, plan))
    with pytest.raises(ValueError, match="layers.0.up: no magnitude, for `layers_0.up.kernel`"):
        adapter_from_torch(plain, plan)
    state = adapter_to_torch(random_adapter(1, plan), "lora")
    state["layers.0.up.lora_magnitude"] = state["layers.0.up.lora_magnitude"][1:]
    with pytest.raises(ValueError, match=r"layers.0.up: the magnitude is \(9,\), not the plan's \(10,\)"):
        adapter_from_torch(state, plan, "lora")


@each_world
def test_models_that_keep_nothing_of_what_is_written(world: Any) -> None:
    model = torch_model(world).to("meta")
    with pytest.raises(ValueError, match="layers.0.up has factors on the meta device, which keep no values"):
        load_torch_adapter(model, ADAPTER)
    with pytest.raises(TypeError, match="meta device holds no values"):
        adapter_from_torch(model, PLAN)


def test_merged_models_are_left_alone() -> None:
    model = torch_model("peft")
    load_torch_adapter(model, ADAPTER)
    base = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    model.merge_adapter()
    with pytest.raises(ValueError, match="layers.1.down has its adapter merged into the base: unmerge it first"):
        load_torch_adapter(model, random_adapter(2))
    model.unmerge_adapter()
    for name, value in base.items():
        torch.testing.assert_close(model.state_dict()[name], value)
    load_torch_adapter(model, random_adapter(2))


def test_wrapped_models_are_to_be_unwrapped() -> None:
    model = torch_model("torchtune")
    wrapped: Any = torch.nn.ModuleDict({"module": model})
    compiled: Any = torch.compile(model, backend="eager")
    for each, attribute in ((wrapped, "module"), (compiled, "_orig_mod")):
        with pytest.raises(ValueError, match=f"layer of the torch model is below `{attribute}`, .*: pass `model"):
            load_torch_adapter(each, ADAPTER)
    load_torch_adapter(compiled._orig_mod, ADAPTER)


def test_sources_that_are_no_models() -> None:
    state = adapter_to_torch(ADAPTER, "lora")
    wrong: Any = "lorra"
    for call in (lambda: adapter_to_torch(ADAPTER, wrong), lambda: adapter_from_torch(state, PLAN, wrong)):
        with pytest.raises(ValueError, match="`dialect='lorra'` is none of"):
            call()
    with pytest.raises(TypeError, match="`source` is a NoneType: pass a torch model or a state dict"):
        adapter_from_torch(None, PLAN)


def test_dora_of_torchtune_scales_its_bias() -> None:
    plan = lj.plan(TWIN, PARAMS, jnp.ones((2, 6)), config=CONFIG.replace(use_dora=True))
    model = TorchModel(lambda i, o, bias: tt.DoRALinear(i, o, RANK, ALPHA, use_bias=bias))
    for call in (lambda: load_torch_adapter(model, random_adapter(1, plan)), lambda: adapter_from_torch(model, plan)):
        with pytest.raises(ValueError, match="layers.0.up.*: a DoRA layer of torchtune multiplies its bias"):
            call()
    # torchtune scales the bias of a DoRA layer, the others do not.
    with pytest.raises(ValueError, match="layers.0.up.*: a DoRA layer of torchtune multiplies its bias"):
        translate(model.state_dict(), "torchtune", "peft")
    without_bias = {name: value for name, value in model.state_dict().items() if name.startswith("layers.0.down.")}
    assert "layers.0.down.lora_magnitude" in translate(without_bias, "torchtune", "lora")


def test_numbers_that_jax_does_not_keep() -> None:
    model = torch_model("torchtune").double()
    with pytest.raises(ValueError, match=r"jax keeps no float64 unless jax_enable_x64 is set; pass `dtype='float32'`"):
        adapter_from_torch(model, PLAN)
    narrow = adapter_from_torch(model, PLAN, dtype="float32")
    assert {x.dtype.name for x in jax.tree.leaves(narrow)} == {"float32"}


def test_what_is_no_linear_layer() -> None:
    params = {"embed": {"embedding": jnp.ones((7, 4))}}
    plan = lj.plan(
        lambda p, ids: p["embed"]["embedding"][ids],
        params,
        jnp.zeros((2,), jnp.int32),
        config=lj.LoRAConfig(rank=2, target_modules=["embed"]),
    )
    with pytest.raises(ValueError, match="`embed.embedding` is of kind 'embedding' in PyTorch: use `save_peft`"):
        adapter_to_torch(random_adapter(0, plan), "peft")


def test_names_that_a_dialect_does_not_have() -> None:
    state = {name: value.numpy() for name, value in torch_model("torchtune").state_dict().items()}
    with pytest.raises(
        ValueError, match="layers.0.up.lora_a.weight has a name of 'torchtune'; pass that as the source"
    ):
        translate(state, "lora", "peft")
    with pytest.raises(ValueError, match="head.bias does not start with `base_model.model.`"):
        translate(state, "peft", "lora")
    with pytest.raises(ValueError, match="head.weight: 'peft-file' holds adapters only; pass keep='adapter'"):
        translate(state, "torchtune", "peft-file")
    with pytest.raises(ValueError, match="layers.0.up: 'plain' has no adapters; merge them, or pass keep='base'"):
        translate(state, "torchtune", "plain")
    for argument in ({"source": "tune"}, {"target": "tune"}, {"keep": "some"}):
        with pytest.raises(ValueError, match=f"`{next(iter(argument))}="):
            translate(state, **{"source": "torchtune", "target": "plain", **argument})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`decoder` is for the way from or to torchtune"):
        translate(state, "torchtune", "torchtune", decoder=TuneDecoder(2, 2, 4))
    with pytest.raises(ValueError, match="`decoder` has torchtune's names, but the dialect is 'peft'"):
        adapter_to_torch(ADAPTER, "peft", decoder=TuneDecoder(2, 2, 4))
    with pytest.raises(ValueError, match="`head_dim` must be positive"):
        TuneDecoder(2, 2, 0)
    with pytest.raises(ValueError, match="need an even `head_dim`, got 3"):
        TuneDecoder(2, 2, 3)


def test_peft_models_with_more_than_one_linear_adapter() -> None:
    model = torch_model("peft")
    model.add_adapter("second", peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"]))
    other = random_adapter(2)
    load_torch_adapter(model, ADAPTER)
    load_torch_adapter(model, other, adapter_name="second")
    for name, want in (("default", ADAPTER), ("second", other)):
        got = adapter_from_torch(model, PLAN, adapter_name=name)
        assert jax.tree.all(jax.tree.map(np.array_equal, got, want))
        file = translate(model.state_dict(), "peft", "peft-file", keep="adapter", adapter_name=name)
        saved = peft.get_peft_model_state_dict(model, adapter_name=name)
        assert file.keys() == saved.keys() and all(torch.equal(file[key], saved[key]) for key in file)

    config = peft.LoraConfig(r=RANK, target_modules=["up"], modules_to_save=["head"])
    whole = peft.get_peft_model(TorchModel(), config)
    with pytest.raises(
        ValueError, match="is trained in full: save the model .*, and read it by `lora_torch.load_peft`"
    ):
        translate(whole.state_dict(), "peft", "lora")


def test_a_whole_decoder_under_torchtunes_names() -> None:
    """Renamed and reordered as a whole, and back; `test_torchtune_to_peft` shows that the order is the right one."""
    hf = {
        "model.embed_tokens.weight": np.zeros((9, 8)),
        "model.layers.0.self_attn.q_proj.weight": np.arange(64.0).reshape(8, 8),
        "model.layers.0.self_attn.q_proj.lora_A.weight": np.arange(16.0).reshape(2, 8),
        "model.layers.0.self_attn.q_proj.lora_B.weight": np.arange(16.0).reshape(8, 2),
        "model.layers.0.input_layernorm.weight": np.ones(8),
        "model.norm.weight": np.ones(8),
        "lm_head.weight": np.zeros((9, 8)),
    }
    hf["model.layers.0.self_attn.q_proj.bias"] = np.arange(8.0)
    tune = translate(hf, "lora", "torchtune", decoder=TuneDecoder(2, 1, 4))
    assert list(tune) == [
        "tok_embeddings.weight",
        "layers.0.attn.q_proj.weight",
        "layers.0.attn.q_proj.lora_a.weight",
        "layers.0.attn.q_proj.lora_b.weight",
        "layers.0.sa_norm.scale",
        "norm.scale",
        "output.weight",
        "layers.0.attn.q_proj.bias",
    ]
    rows = [0, 2, 1, 3, 4, 6, 5, 7]  # of two heads of four: halves to pairs
    for part in ("weight", "lora_b.weight", "bias"):
        source = hf["model.layers.0.self_attn.q_proj." + part.replace("lora_b", "lora_B")]
        assert np.array_equal(tune[f"layers.0.attn.q_proj.{part}"], source[rows])
    back = translate(tune, "torchtune", "lora", decoder=TuneDecoder(2, 1, 4))
    assert list(back) == list(hf) and all(np.array_equal(back[name], hf[name]) for name in hf)
    halves = translate(hf, "lora", "torchtune", decoder=TuneDecoder(2, 1, 4, interleaved=False))
    assert all(halves[one] is hf[other] for one, other in zip(halves, hf, strict=True))


def test_flax_names_reach_a_torchtune_decoder() -> None:
    params = {"model": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": jnp.arange(64.0).reshape(8, 8)}}}}}}
    plan = lj.plan(
        lambda p, x: x @ p["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"],
        params,
        jnp.ones((1, 8)),
        config=lj.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=["q_proj"]),
    )
    attn: Any = torch.nn.ModuleDict({"q_proj": tt.LoRALinear(8, 8, RANK, ALPHA)})
    model: Any = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"attn": attn})])})
    decoder, adapter = TuneDecoder(2, 2, 4), random_adapter(3, plan)
    load_torch_adapter(model, adapter, decoder=decoder)
    base = translate(to_torch_state_dict(params, preset="nnx", kind="torch"), "plain", "torchtune", decoder=decoder)
    model.load_state_dict(base, strict=False)
    x = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    y = attn["q_proj"](torch.tensor(x)).detach().numpy()
    want = np.asarray(
        lj.apply(lambda p, x: x @ p["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"], plan)(params, adapter, x)
    )
    np.testing.assert_allclose(y, want[:, [0, 2, 1, 3, 4, 6, 5, 7]], rtol=1e-5, atol=1e-4)
    assert jax.tree.all(jax.tree.map(np.array_equal, adapter_from_torch(model, plan, decoder=decoder), adapter))
