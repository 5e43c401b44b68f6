"""A run that begins in torch, goes on in JAX and comes back ends where ten steps in either world end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import lora_jax as lj  # noqa: E402
from lora_torch import (  # noqa: E402
    adapter_from_torch,
    load_torch_adapter,
    optimizer_from_torch,
    optimizer_to_torch,
)
from tests.interop.peft_models import agree  # noqa: E402
from tests.interop.worlds import PARAMS, PLAN, RUN, WORLDS, random_adapter, torch_model  # noqa: E402

START = random_adapter(11)
RNG = np.random.default_rng(4)
DATA = [(RNG.normal(size=(5, 6)).astype(np.float32), RNG.normal(size=(5, 3)).astype(np.float32)) for _ in range(10)]
RATE, DECAY = 0.02, 0.05

Optimizers = tuple[optax.GradientTransformation, Callable[[Any], Any]]
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": (optax.sgd(RATE), lambda p: torch.optim.SGD(p, RATE)),
    "momentum": (optax.sgd(RATE, momentum=0.9), lambda p: torch.optim.SGD(p, RATE, momentum=0.9)),
    "adamw": (
        optax.adamw(RATE, weight_decay=DECAY),
        lambda p: torch.optim.AdamW(p, RATE, weight_decay=DECAY),
    ),
}


def in_torch(model: Any, optimizer: Any, data: Any) -> None:
    for x, y in data:
        optimizer.zero_grad()
        (model(torch.tensor(x)) - torch.tensor(y)).square().mean().backward()
        optimizer.step()


@functools.cache
def jax_step(kind: str) -> Any:
    tx = OPTIMIZERS[kind][0]

    @jax.jit
    def step(adapter: Any, state: Any, x: Any, y: Any) -> Any:
        gradient = jax.grad(lambda a: ((RUN(PARAMS, a, x) - y) ** 2).mean())(adapter)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    return step


def in_jax(kind: str, adapter: Any, state: Any, data: Any) -> tuple[Any, Any]:
    for x, y in data:
        adapter, state = jax_step(kind)(adapter, state, x, y)
    return adapter, state


def close(one: Any, other: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: agree(np.asarray(a), np.asarray(b)), one, other)))


def new_torch(world: Any, make: Any, adapter: Any) -> tuple[Any, Any]:
    model = torch_model(world)
    load_torch_adapter(model, adapter)
    return model, make([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_run_that_moves(kind: str, world: Any) -> None:
    tx, make = OPTIMIZERS[kind]
    model, optimizer = new_torch(world, make, START)
    in_torch(model, optimizer, DATA)
    want = adapter_from_torch(model, PLAN)
    ten, whole = in_jax(kind, START, tx.init(START), DATA)
    assert close(ten, want) and not close(START, want)

    # Five steps in torch, then five in JAX.
    model, optimizer = new_torch(world, make, START)
    in_torch(model, optimizer, DATA[:5])
    adapter = adapter_from_torch(model, PLAN)
    state = optimizer_from_torch(optimizer, model, PLAN, tx.init(adapter))
    assert jax.tree.structure(state) == jax.tree.structure(whole)
    moved, moved_state = in_jax(kind, adapter, state, DATA[5:])
    assert close(moved, want)
    if kind != "sgd":  # moments that stay behind would have shown
        assert not close(in_jax(kind, adapter, tx.init(adapter), DATA[5:])[0], want)
    # And back: the torch optimizer is where ten steps of its own would have brought it.
    optimizer.load_state_dict(optimizer_to_torch(moved_state, PLAN, model, optimizer))
    load_torch_adapter(model, moved)
    again = optimizer_from_torch(optimizer, model, PLAN, tx.init(adapter))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, moved_state))
    in_torch(model, optimizer, DATA[:2])
    straight, _ = in_jax(kind, ten, whole, DATA[:2])
    assert close(adapter_from_torch(model, PLAN), straight)


def test_schedules_hyperparameters_and_clipping() -> None:
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(RATE, 0.0, 10), weight_decay=DECAY),
    )
    model, optimizer = new_torch("torchtune", OPTIMIZERS["adamw"][1], START)
    in_torch(model, optimizer, DATA[:3])
    state = optimizer_from_torch(optimizer, model, PLAN, tx.init(START))
    counts = [x for path, x in jax.tree_util.tree_flatten_with_path(state)[0] if "count" in str(path[-1])]
    assert len(counts) > 1 and {int(x) for x in counts} == {3}
    back = optimizer_to_torch(state, PLAN, model, optimizer)
    kept = optimizer.state_dict()
    for index, each in kept["state"].items():
        assert each.keys() == back["state"][index].keys()
        assert all(torch.equal(torch.as_tensor(each[slot]), back["state"][index][slot]) for slot in each)
    assert back["param_groups"] == kept["param_groups"]
    # Before the first step there is nothing but zeros.
    model, optimizer = new_torch("torchtune", OPTIMIZERS["adamw"][1], START)
    fresh = optimizer_from_torch(optimizer, model, PLAN, state)
    assert not any(np.any(x) for path, x in jax.tree_util.tree_flatten_with_path(fresh)[0] if "mu" in str(path))


def test_an_nnx_optimizer() -> None:
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.up = nnx.Linear(6, 4, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.up(x)

    config = lj.LoRAConfig(rank=2, alpha=3.0, target_modules=["up"])
    adapted = lj.nnx.adapt(Net(), config, np.ones((1, 6), np.float32), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(adapted, OPTIMIZERS["adamw"][0], wrt=nnx.LoRAParam)
    plan, x = lj.nnx.plan_of(adapted), DATA[0][0]
    for _ in range(2):
        gradient = nnx.grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)
        optimizer.update(adapted, gradient)

    from lora_torch import torchtune as tt

    model = torch.nn.ModuleDict({"up": tt.LoRALinear(6, 4, 2, 3.0, use_bias=True)})
    tt.set_trainable_params(model, tt.get_adapter_params(model))
    other = OPTIMIZERS["adamw"][1]([p for p in model.parameters() if p.requires_grad])
    load_torch_adapter(model, lj.nnx.adapter_of(adapted), names="nnx")
    other.load_state_dict(optimizer_to_torch(optimizer.opt_state, plan, model, other, names="nnx"))
    moment = other.state[model["up"].lora_b.weight]
    assert moment["step"] == 2 and moment["exp_avg_sq"].abs().max() > 0
    back = optimizer_from_torch(other, model, plan, optimizer.opt_state, names="nnx")
    assert jax.tree.structure(back) == jax.tree.structure(optimizer.opt_state)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, optimizer.opt_state))


def test_optimizers_that_do_not_fit() -> None:
    adam, sgd = OPTIMIZERS["adamw"], OPTIMIZERS["sgd"]
    model, optimizer = new_torch("torchtune", adam[1], START)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def refused(what: str, state: Any, optimizer: Any) -> None:
        for call in (
            lambda: optimizer_to_torch(state, PLAN, model, optimizer),
            lambda: optimizer_from_torch(optimizer, model, PLAN, state),
        ):
            with pytest.raises(ValueError, match=what):
                call()

    state = adam[0].init(START)
    refused("holds no moments, torch's AdamW \\['exp_avg', 'exp_avg_sq'\\]", sgd[0].init(START), optimizer)
    refused("holds \\['mu', 'nu'\\], torch's SGD none", state, sgd[1](parameters))
    refused("`amsgrad=True` keeps a third moment", state, torch.optim.AdamW(parameters, amsgrad=True))
    refused("`dampening` has no counterpart", state, torch.optim.SGD(parameters, 0.1, momentum=0.9, dampening=0.5))
    refused("Adagrad is none of torch's Adam, AdamW and SGD", state, torch.optim.Adagrad(parameters))
    refused("it lacks layers.0.down.lora_a.weight", state, adam[1](parameters[:2]))
    refused("it holds head.bias, which is not the adapter's", state, adam[1]([*parameters, model.head.bias]))
    refused(
        "of the optax state is no moment of adamw or sgd of this adapter", optax.adafactor(0.1).init(START), optimizer
    )
    in_torch(model, optimizer, DATA[:1])
    del optimizer.state[parameters[0]]
    with pytest.raises(ValueError, match="took no step in torch, other parameters did"):
        optimizer_from_torch(optimizer, model, PLAN, state)
    scheduled = optax.sgd(optax.linear_schedule(0.1, 0.0, 10))
    with pytest.raises(ValueError, match="SGD counts none in torch: pass `step=`"):
        optimizer_from_torch(sgd[1](parameters), model, PLAN, scheduled.init(START))
    placed = optimizer_from_torch(sgd[1](parameters), model, PLAN, scheduled.init(START), step=4)
    assert [int(x) for x in jax.tree.leaves(placed)] == [4]
