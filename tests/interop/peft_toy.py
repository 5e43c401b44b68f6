"""A small model, its adapter in a PEFT directory, and ways to spoil that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_torch import save_peft
from tests.interop.peft_models import random_adapter

PARAMS = {f"layers_{i}": {p: {"kernel": jnp.ones((4, 6))} for p in ("q", "v")} for i in range(2)}
X = jnp.ones((3, 4))
P = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def fn(params: Any, x: Any) -> Any:
    return sum(x @ layer[p]["kernel"] for layer in params.values() for p in ("q", "v"))


def plan_of(**settings: Any) -> lj.Plan:
    return lj.plan(fn, PARAMS, X, config=lj.LoRAConfig(**{"rank": 2, "target_modules": ["q", "v"], **settings}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    plan = plan_of()
    return save_peft(random_adapter(plan), tmp_path / "adapter", plan)


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(directory / TENSORS)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, directory / TENSORS)


def key(layer: int, module: str, factor: str) -> str:
    return f"{P}layers.{layer}.{module}.lora_{factor}.weight"
