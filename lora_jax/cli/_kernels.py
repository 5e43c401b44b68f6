"""Torch weights as the Flax kernels that `save_peft` gives their names back to, for commands without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lora_jax.sites import Atom, Site


def kernel_order(weight: np.ndarray) -> np.ndarray:
    """(out, in, *window) -> (*window, in, out), which without a window is a transpose."""
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def kernel_site(module: str, shape: tuple[int, ...], rank: int, alpha: float, op: str = "linear") -> Site:
    """The weight of a torch module as a Flax layer stores it, `shape` being (*window, in, out)."""
    last = len(shape) - 1
    return Site(
        path=(*module.split("."), "embedding" if op == "embedding" else "kernel"),
        shape=shape,
        dtype="float32",
        op=op,
        atoms=tuple(Atom(d, 1, n) for d, n in enumerate(shape)),
        roles="i" * last + "o",
        rank=rank,
        alpha=alpha,
        kernel_spec=(last, last - 1, *range(last - 1)) if op == "conv" else None,
    )


def say_fan_in_fan_out(directory: str | Path) -> None:
    """Notes in an export that the base stores (in, out), which no kernel tells."""
    path = Path(directory) / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "fan_in_fan_out": True}, indent=2, sort_keys=True) + "\n", "utf-8")
