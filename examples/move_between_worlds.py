"""Begins a LoRA run in torch, goes on in JAX, and comes back, optimizer included: the same as if it had stayed.

    python examples/move_between_worlds.py

The model is an MLP with random weights and data, so that nothing is downloaded; names, checks and calls are those of a
real one.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import lora_jax as lj
from lora_torch import (
    adapter_from_torch,
    load_torch_adapter,
    optimizer_from_torch,
    optimizer_to_torch,
    to_torch_state_dict,
)
from lora_torch import torchtune as tt

RANK, ALPHA = 4, 8.0
RATE, DECAY = 1e-2, 0.01  # said to both libraries: their defaults differ


class FlaxModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(8, name="down")(nn.gelu(nn.Dense(64, name="up")(x), approximate=False))


class TorchModel(torch.nn.Module):
    """The same model, out of layers that bring their adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = tt.LoRALinear(16, 64, RANK, ALPHA, use_bias=True)
        self.down = tt.LoRALinear(64, 8, RANK, ALPHA, use_bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(32, 16)).astype("float32"), rng.normal(size=(32, 8)).astype("float32")) for _ in range(count)
    ]


def new_torch(params: dict, adapter: lj.Adapter) -> tuple[TorchModel, torch.optim.Optimizer]:
    model = TorchModel()
    model.load_state_dict(to_torch_state_dict(params, preset="linen", kind="torch", copy=True), strict=False)
    tt.set_trainable_params(model, tt.get_adapter_params(model))
    load_torch_adapter(model, adapter)
    return model, torch.optim.AdamW(tt.get_adapter_params(model).values(), lr=RATE, weight_decay=DECAY)


def train_torch(model: TorchModel, optimizer: torch.optim.Optimizer, data: list) -> None:
    for x, y in data:
        optimizer.zero_grad()
        loss = (model(torch.tensor(x)) - torch.tensor(y)).square().mean()
        loss.backward()
        optimizer.step()
        print(f"  torch  loss {loss.item():.5f}")


def main() -> float:
    """Runs ten steps three ways; returns how far apart the adapters end, relative to the largest weight."""
    data = batches(10)
    params = FlaxModel().init(jax.random.key(0), data[0][0])["params"]
    config = lj.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=["up", "down"])
    model, start = lj.linen.adapt(FlaxModel(), params, config, data[0][0], key=jax.random.key(1))
    tx = optax.adamw(RATE, weight_decay=DECAY)

    @jax.jit
    def step(adapter: lj.Adapter, state: optax.OptState, x: jax.Array, y: jax.Array):
        def loss_fn(adapter: lj.Adapter) -> jax.Array:
            return jnp.square(model.apply({"params": params, "lora": adapter}, x) - y).mean()

        loss, gradient = jax.value_and_grad(loss_fn)(adapter)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    print("ten steps in torch")
    twin, optimizer = new_torch(params, start)
    train_torch(twin, optimizer, data)
    stayed = adapter_from_torch(twin, model.plan)

    print("four steps in torch, three in JAX, three in torch")
    twin, optimizer = new_torch(params, start)
    train_torch(twin, optimizer, data[:4])
    adapter = adapter_from_torch(twin, model.plan)
    state = optimizer_from_torch(optimizer, twin, model.plan, tx.init(adapter))
    for x, y in data[4:7]:
        adapter, state, loss = step(adapter, state, x, y)
        print(f"  JAX    loss {loss:.5f}")
    load_torch_adapter(twin, adapter)
    optimizer.load_state_dict(optimizer_to_torch(state, model.plan, twin, optimizer))
    train_torch(twin, optimizer, data[7:])
    moved = adapter_from_torch(twin, model.plan)

    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (stayed, moved)), strict=True)]
    apart = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
    print(f"largest difference, relative to the largest weight: {apart:.1e}")
    return apart


if __name__ == "__main__":
    main()
