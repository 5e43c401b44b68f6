"""`lora-jax extract`: the low-rank part of a full fine-tuning, as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax
from lora_jax.adapters import nested
from lora_jax.cli._edits import CONV1D_MODELS, CONV1D_MODULES
from lora_jax.cli._kernels import kernel_order, kernel_site, say_fan_in_fan_out
from lora_jax.cli._show import console, listed
from lora_jax.peft_matching import is_target
from lora_jax.rows import Row
from lora_torch.hf_checkpoint import Checkpoint, open_checkpoint


def extract(
    base_dir: str,
    tuned_dir: str,
    out_dir: str,
    target_modules: list[str],
    *,
    rank: int = 16,
    alpha: float | None = None,
    iterations: int = 4,
    seed: int = 0,
    partial: bool = False,
) -> None:
    """Extract a PEFT LoRA adapter from a base and a full fine-tuning of it, two Hugging Face directories.

    Args:
        base_dir: The base model.
        tuned_dir: The same model, fine-tuned.
        out_dir: The directory to write; it must not exist yet.
        target_modules: The linear layers to extract, by names or ends of names, as in PEFT.
        rank: Of every module.
        alpha: lora_alpha, equal to the rank by default. It says how the change is written, not what it is.
        iterations: Power steps of the randomised SVD; more are more exact.
        seed: Of the randomised SVD.
        partial: Accept that other tensors differ too, whose changes are lost.
    """
    from lora_torch import save_peft

    if Path(out_dir).exists():
        raise ValueError(f"{out_dir} exists already; name a new directory, nothing is overwritten.")
    base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
    config = lora_jax.LoRAConfig(rank=rank, alpha=rank if alpha is None else alpha, target_modules=target_modules)
    modules = _modules(base, target_modules)
    plan = _plan(base, modules, config)
    trees = (nested({_path(name, modules): Lazy(source, name, modules.get(name)) for name in source.entries})
             for source in (base, tuned))  # fmt: skip
    found = lora_jax.extract(plan, *trees, key=jax.random.key(seed), iterations=iterations, partial=partial)
    save_peft(found.adapter, out_dir, plan, base_model_name_or_path=base_dir)
    if any(module.conv1d for module in modules.values()):
        say_fan_in_fan_out(out_dir)
    shares = sorted(found.kept.values())
    out = console()
    out.print(f"rank {rank} holds {shares[0]:.1%} to {shares[-1]:.1%} of the squared change of {len(shares)} modules")
    out.print(f"wrote {out_dir}")


@dataclass(frozen=True)
class Module:
    """A targeted linear layer; `conv1d` if its weight is stored (in, out)."""

    name: str
    conv1d: bool


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor that is read from its file whenever it is used, a targeted one as a kernel."""

    source: Checkpoint
    name: str
    module: Module | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.source.entries[self.name].shape
        return shape[::-1] if self.module and not self.module.conv1d else shape

    @property
    def dtype(self) -> np.dtype:
        return self.source.entries[self.name].dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self.source.tensor(self.name)
        value = kernel_order(value) if self.module and not self.module.conv1d else value
        return value if dtype is None else value.astype(dtype)


def _modules(base: Checkpoint, targets: list[str]) -> dict[str, Module]:
    """The targeted layers by the names of their weights.

    **Raises:** `ValueError` for targets that name nothing, or no linear layer.
    """
    conv1d = str(base.config.get("model_type")) in CONV1D_MODELS
    out, problems, used = {}, [], set()
    for name, entry in base.entries.items():
        module, _, last = name.rpartition(".")
        hits = [target for target in targets if is_target({"target_modules": [target]}, module)]
        used.update(hits)
        if not hits or last != "weight":
            continue
        if len(entry.shape) != 2:
            problems.append(f"{name} is {entry.shape}")
        out[name] = Module(module, conv1d and module.rpartition(".")[2] in CONV1D_MODULES)
    if problems:
        raise ValueError(f"only linear layers can be extracted, and the targets name others too: {listed(problems)}.")
    if unused := [target for target in targets if target not in used]:
        raise ValueError(f"{base.directory} has no module {', '.join(unused)}; it has {listed(sorted(base.entries))}.")
    return out


def _path(name: str, modules: Mapping[str, Module]) -> tuple[str, ...]:
    return (*modules[name].name.split("."), "kernel") if name in modules else tuple(name.split("."))


def _plan(base: Checkpoint, modules: Mapping[str, Module], config: lora_jax.LoRAConfig) -> lora_jax.Plan:
    rows = []
    for name, entry in base.entries.items():
        shape, site = entry.shape, None
        if name in modules:
            shape = shape if modules[name].conv1d else shape[::-1]
            site = kernel_site(modules[name].name, shape, config.rank, config.alpha)
        rows.append(Row(_path(name, modules), shape, entry.dtype.name, site, "" if site else "not targeted"))
    return lora_jax.Plan(config, tuple(row.site for row in rows if row.site), tuple(rows))
