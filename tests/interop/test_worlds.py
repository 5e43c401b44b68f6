"""One adapter and one base in four worlds: lora_jax, PEFT, torchtune's modules and `lora_torch.lora`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from torch.distributed.checkpoint import save  # noqa: E402

import lora_jax as lj  # noqa: E402
from lora_jax.sites import MAGNITUDE  # noqa: E402
from lora_torch import (  # noqa: E402
    adapter_from_torch,
    adapter_to_torch,
    from_torch_state_dict,
    load_torch_adapter,
    optimizer_from_torch,
    optimizer_to_torch,
    read_state_dict,
    to_torch_state_dict,
    translate,
    write_state_dict,
)
from tests.interop.peft_models import agree  # noqa: E402
from tests.interop.worlds import (  # noqa: E402
    ALPHA,
    CONFIG,
    MODEL,
    PARAMS,
    PLAN,
    RANK,
    RUN,
    WORLDS,
    X,
    base_state,
    fn,
    random_adapter,
    run_torch,
    torch_model,
)

each_world = pytest.mark.parametrize("world", WORLDS)


def same(one: Any, other: Any) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(np.array_equal, one, other)
    )


@each_world
def test_a_jax_adapter_in_a_torch_model_and_back(world: Any) -> None:
    adapter = random_adapter(2)
    model = torch_model(world)
    held = {name: p.data_ptr() for name, p in model.named_parameters()}
    load_torch_adapter(model, adapter, names="linen")
    want = np.asarray(RUN(PARAMS, adapter, X))
    assert agree(run_torch(model), want)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == held  # its optimizer stays right
    assert not agree(np.asarray(fn(PARAMS, X)), want)
    halved = jax.tree.map(lambda x: x / 2, adapter)
    assert not agree(np.asarray(RUN(PARAMS, halved, X)), want)

    back = adapter_from_torch(model, PLAN, names="linen")
    assert same(back, adapter) and back.sites == adapter.sites
    # Through state dicts of every kind of array, which are those of the model itself.
    trained = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    for kind in ("torch", "numpy", "jax"):
        state = adapter_to_torch(adapter, world, names="linen", kind=kind)
        assert state.keys() == trained.keys()
        assert all(np.array_equal(np.asarray(state[name]), trained[name].numpy()) for name in state)
        assert same(adapter_from_torch(state, PLAN, world, names="linen"), adapter)
    narrow = adapter_from_torch(model.state_dict(), PLAN, world, names="linen", dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(narrow)} == {"bfloat16"}


@each_world
def test_dora(world: Any) -> None:
    """Magnitudes go with the factors, and their moments with the factors' moments."""
    params = jax.tree.map(lambda x: x, PARAMS)
    for i in range(2):
        params[f"layers_{i}"]["up"]["bias"] = jax.numpy.zeros(10)
    plan = lj.plan(fn, params, X, config=CONFIG.replace(use_dora=True))
    run = jax.jit(lj.apply(fn, plan))
    adapter = random_adapter(2, plan)
    want = np.asarray(run(params, adapter, X))
    model = torch_model(world, base=base_state(params), dora=True)
    held = {name: p.data_ptr() for name, p in model.named_parameters()}
    load_torch_adapter(model, adapter)
    assert agree(run_torch(model), want)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == held
    at_first = jax.tree_util.tree_map_with_path(lambda p, x: x if MAGNITUDE not in str(p) else 1 + 0 * x, adapter)
    assert not agree(np.asarray(run(params, at_first, X)), want)
    assert same(adapter_from_torch(model, plan), adapter)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for kind in ("torch", "numpy", "jax"):
        state = adapter_to_torch(adapter, world, kind=kind)
        assert state.keys() == trained and len(trained) == 12
        assert same(adapter_from_torch(state, plan, world), adapter)

    tx, optimizer = optax.adam(1e-2), torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    state = tx.init(adapter)
    state = jax.tree.map(lambda x: x + 3 if x.ndim == 0 else abs(x) + 0.1, (state[0]._replace(mu=adapter, nu=adapter),))
    optimizer.load_state_dict(optimizer_to_torch(state, plan, model, optimizer))
    assert same(optimizer_from_torch(optimizer, model, plan, (tx.init(adapter)[0],)), state)


@pytest.mark.parametrize("source,target", list(itertools.permutations(WORLDS, 2)))
def test_torch_models_exchange_whole_state_dicts(source: Any, target: Any) -> None:
    one, two = torch_model(source, base=base_state()), torch_model(target)
    load_torch_adapter(one, random_adapter(3), names="linen")
    state = translate(one.state_dict(), source, target)
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.fill_(0.1)
    assert not agree(run_torch(two), run_torch(one))
    two.load_state_dict(state)  # strict: every name fits
    assert agree(run_torch(two), run_torch(one))
    assert all(
        value.data_ptr() == one.state_dict()[name].data_ptr()
        for name, value in zip(one.state_dict(), state.values(), strict=True)
    )


@each_world
def test_bases_go_both_ways(world: Any) -> None:
    model = torch_model(world)
    base = translate(model.state_dict(), world, "plain", keep="base")
    params = from_torch_state_dict(base, PARAMS, preset="linen")
    assert same(params, PARAMS)
    other = jax.tree.map(lambda x: 2 * x, PARAMS)
    adapted = list(dict.fromkeys(name for site in PLAN.sites for name in [site.module.replace("_", ".")]))
    state = translate(to_torch_state_dict(other, preset="linen", kind="torch"), "plain", world, adapted=adapted)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("lora_" in name for name in missing)
    load_torch_adapter(model, random_adapter(4), names="linen")
    assert agree(run_torch(model), np.asarray(RUN(other, random_adapter(4), X)))


def test_a_stack_of_layers_and_a_head_trained_in_full() -> None:
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x: Any, _: Any) -> Any:
            hidden = jax.numpy.tanh(linen.Dense(10, name="up")(x))
            return x + linen.Dense(6, use_bias=False, name="down")(hidden), None

    class Scanned(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            stack = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = stack(name="layers")(x, None)
            return linen.Dense(3, name="head")(x)

    params = {
        "layers": jax.tree.map(lambda *x: jax.numpy.stack(x), PARAMS["layers_0"], PARAMS["layers_1"]),
        "head": PARAMS["head"],
    }

    def scanned(p: Any, x: Any) -> Any:
        return Scanned().apply({"params": p}, x)

    config = lj.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=["up", "down"], modules_to_save=["head"])
    plan = lj.plan(scanned, params, X, config=config)
    adapter = random_adapter(5, plan)
    model = torch_model("torchtune")
    load_torch_adapter(model, adapter)
    want = np.asarray(lj.apply(scanned, plan)(params, adapter, X))
    assert agree(run_torch(model), want) and not agree(np.asarray(scanned(params, X)), want)
    assert same(adapter_from_torch(model, plan), adapter)
    shared = adapter_from_torch(model, plan, copy=False)
    assert same(shared, adapter)
    with pytest.raises(ValueError, match="`head.bias` is trained in full, for which PEFT wraps the module"):
        adapter_to_torch(adapter, "peft")


@each_world
@pytest.mark.filterwarnings("ignore")  # of torch's own checkpoints
def test_files(world: Any, tmp_path: Path) -> None:
    adapter = random_adapter(6)
    model = torch_model(world)
    load_torch_adapter(model, adapter)
    save({"model": model.state_dict(), "step": 5}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    whole = read_state_dict(tmp_path / "dcp", prefix="model.")
    assert same(adapter_from_torch(whole, PLAN, world), adapter)
    assert same(from_torch_state_dict(translate(whole, world, "plain", keep="base"), PARAMS, preset="linen"), PARAMS)
    # And out of JAX: what torch reads is what was written.
    state = adapter_to_torch(adapter, world)
    for name in ("a.safetensors", "a"):
        path = write_state_dict(state, tmp_path / name)
        back = read_state_dict(path, kind="numpy")
        assert back.keys() == state.keys() and same(adapter_from_torch(back, PLAN, world), adapter)
        with pytest.raises(FileExistsError):
            write_state_dict(state, path)
    fresh = torch_model(world)
    fresh.load_state_dict({**fresh.state_dict(), **read_state_dict(tmp_path / "a.safetensors")})
    assert agree(run_torch(fresh), np.asarray(RUN(PARAMS, adapter, X)))
    with pytest.raises(ValueError, match="step are no tensors; choose those that are by `prefix=`"):
        read_state_dict(tmp_path / "dcp")
    with pytest.raises(ValueError, match="holds no name that begins with 'nodel.'"):
        read_state_dict(tmp_path / "dcp", prefix="nodel.")
    with pytest.raises(ValueError, match="is a directory without .metadata"):
        read_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "b")


def test_one_base_in_memory_for_both() -> None:
    params = jax.tree.map(jax.numpy.array, PARAMS)
    views = to_torch_state_dict(params, preset="linen", kind="torch", contiguous=False)
    kernel = params["layers_0"]["up"]["kernel"]
    assert views["layers.0.up.weight"].data_ptr() == kernel.unsafe_buffer_pointer()
    assert not views["layers.0.up.weight"].is_contiguous()
    model = torch_model("torchtune")
    adapted = model.state_dict()
    model.load_state_dict({**adapted, **views}, assign=True)
    load_torch_adapter(model, random_adapter(7))
    assert model.layers[0].up.weight.data_ptr() == kernel.unsafe_buffer_pointer()
    assert agree(run_torch(model), np.asarray(RUN(params, random_adapter(7), X)))
    back = from_torch_state_dict(
        translate(model.state_dict(), "torchtune", "plain", keep="base"), params, preset="linen"
    )
    assert back["layers_0"]["up"]["kernel"].unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer()
    # An adapter that only changes its axes is shared as well.
    adapter = random_adapter(8)
    shared = adapter_to_torch(adapter, "torchtune", kind="torch")
    again = adapter_from_torch(shared, PLAN, "torchtune", copy=False)
    assert same(again, adapter)


def test_later_training_changes_no_copy() -> None:
    """Of rank 1 too, where a transposed factor could be the same memory."""
    plan = lj.plan(fn, PARAMS, X, config=lj.LoRAConfig(rank=1, alpha=1.5, target_modules=["up", "down"]))
    model = torch_model("torchtune", 1, 1.5)
    adapter = adapter_from_torch(model, plan)
    before = jax.tree.map(np.array, adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same(jax.tree.map(np.array, adapter), before)
    assert not same(jax.tree.map(np.array, adapter_from_torch(model, plan)), before)


@pytest.mark.filterwarnings("ignore")  # of torch's own checkpoints
def test_files_keep_shapes_and_dtypes(tmp_path: Path) -> None:
    """Scalars, as BatchNorm's counts are, stay scalars; views, half precision and truth values stay what they are."""
    state = {
        "norm.num_batches_tracked": torch.tensor(3),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "turned": torch.randn(3, 4).T,
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2, dtype=torch.float16),
    }
    for name in ("a.safetensors", "a"):
        back = read_state_dict(write_state_dict(state, tmp_path / name))
        for key, value in state.items():
            assert back[key].shape == value.shape and back[key].dtype == value.dtype and torch.equal(back[key], value)


def test_names_of_flax_variables() -> None:
    assert MODEL.apply({"params": PARAMS}, X).shape == (5, 3)
    assert list(adapter_to_torch(random_adapter(0), "peft-file", kind="numpy"))[:2] == [
        "base_model.model.layers.0.down.lora_A.weight",
        "base_model.model.layers.0.down.lora_B.weight",
    ]
