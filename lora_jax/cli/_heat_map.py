"""A picture of an adapter: the norm of every module's update, layers by module types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def layer_and_type(module: str) -> tuple[int | None, str]:
    """(3, "self_attn.q_proj") of "model.layers.3.self_attn.q_proj"; (None, "lm_head") of "lm_head"."""
    pieces = module.split(".")
    at = next((i for i, piece in enumerate(pieces) if piece.isdecimal()), None)
    return (None, module) if at is None else (int(pieces[at]), ".".join(pieces[at + 1 :]) or pieces[at - 1])


def heat_map_grid(norms: Mapping[str, float]) -> tuple[list[str], list[str], np.ndarray]:
    """(layer labels, module types, norms (layers, types)); NaN where a layer has no such module.

    Modules of equal layer and type in different stacks (an encoder's and a decoder's) add in quadrature.
    """
    keys = [layer_and_type(name) for name in norms]
    layers = sorted({layer for layer, _ in keys}, key=lambda n: -1 if n is None else n)
    types = list(dict.fromkeys(kind for _, kind in keys))
    grid = np.full((len(layers), len(types)), np.nan)
    for (layer, kind), norm in zip(keys, norms.values(), strict=True):
        at = layers.index(layer), types.index(kind)
        grid[at] = norm if np.isnan(grid[at]) else math.hypot(grid[at], norm)
    return ["–" if layer is None else str(layer) for layer in layers], types, grid


def write_heat_map(norms: Mapping[str, float], path: Path) -> None:
    """Draws `heat_map_grid` to a PNG. **Raises:** `ImportError` naming the extra if matplotlib is missing."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--png {path}: the heat map is a PNG; give it a name that ends in .png.")
    if not norms:
        raise ValueError("--png: this adapter has no low-rank modules to draw.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--png needs matplotlib: pip install 'lora-jax[cli]'.") from error
    layers, types, grid = heat_map_grid(norms)
    # No pyplot: it would choose a display and keep global state.
    figure = Figure(figsize=(2.5 + 0.6 * len(types), 2.0 + 0.25 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(types)), types, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    axes.set_title("‖s·B·A‖ per module")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
