"""One small model in Flax and in torch, with the same base, adapted in every way that exchanges adapters."""

from __future__ import annotations

import importlib.util
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import lora_jax as lj
from lora_jax.adapters import expected_leaves
from lora_torch import to_torch_state_dict
from lora_torch import torchtune as tt
from lora_torch.dialects import DialectName

WIDTH, INNER, RANK, ALPHA = 6, 10, 2, 3.0
CONFIG = lj.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=["up", "down"])
X = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)

WORLDS: list[DialectName] = ["torchtune", "peft"]
if importlib.util.find_spec("lora_torch.lora") is not None:
    WORLDS.append("lora")


class FlaxLayer(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return x + linen.Dense(WIDTH, use_bias=False, name="down")(jnp.tanh(linen.Dense(INNER, name="up")(x)))


class FlaxModel(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        for i in range(2):
            x = FlaxLayer(name=f"layers_{i}")(x)
        return linen.Dense(3, name="head")(x)


class TorchLayer(nn.Module):
    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Any) -> Any:
        return x + self.down(torch.tanh(self.up(x)))


class TorchModel(nn.Module):
    def __init__(self, linear: Any = nn.Linear):
        super().__init__()
        layers = [
            TorchLayer(linear(WIDTH, INNER, bias=True), linear(INNER, WIDTH, bias=False))
            for _ in range(2)
        ]  # fmt: skip
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def random_like(tree: Any, seed: int, scale: float = 0.4) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * scale, jnp.float32), tree)


MODEL = FlaxModel()
PARAMS = random_like(jax.eval_shape(MODEL.init, jax.random.key(0), X)["params"], seed=1)


def fn(params: Any, x: Any) -> Any:
    return MODEL.apply({"params": params}, x)


PLAN = lj.plan(fn, PARAMS, X, config=CONFIG)
RUN = jax.jit(lj.apply(fn, PLAN))


def random_adapter(seed: int, plan: lj.Plan = PLAN) -> lj.Adapter:
    shapes = expected_leaves(plan.sites)
    like = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return lj.Adapter.from_leaves(random_like(like, seed), plan.sites)


def base_state(params: Any = PARAMS) -> dict[str, Any]:
    return to_torch_state_dict(params, preset="linen", kind="torch", copy=True)


def torch_model(
    world: DialectName, rank: int = RANK, alpha: float = ALPHA, base: Any = None, dora: bool = False
) -> Any:
    """The torch twin, adapted, with the base's values and an adapter of its own; only the adapter is trainable.

    With DoRA the layers of torchtune have no bias, which it would scale.
    """
    base = base_state() if base is None else base
    if world == "torchtune":
        kind = tt.DoRALinear if dora else tt.LoRALinear
        model = TorchModel(lambda i, o, bias: kind(i, o, rank, alpha, use_bias=bias and not dora))
        model.load_state_dict(base, strict=False)
        tt.set_trainable_params(model, tt.get_adapter_params(model))
        return model
    model = TorchModel()
    model.load_state_dict(base)
    if world == "peft":
        import peft

        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["up", "down"], use_dora=dora)  # type: ignore[arg-type]
        return peft.get_peft_model(model, config)  # type: ignore[arg-type]
    from lora_torch.lora import PeftConfig, apply_lora_to_linear_modules  # pyright: ignore[reportMissingImports]

    apply_lora_to_linear_modules(
        model, PeftConfig(target_modules=["*.up", "*.down"], dim=rank, alpha=alpha, use_dora=dora)
    )
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def run_torch(model: Any, x: np.ndarray = X) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(x)).numpy()
