"""The picture of a run: loss and the metric over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 15  # steps in the moving average of the training loss


def write_curves(records: list[dict[str, Any]], headline: str, path: Path) -> None:
    """Draws the records of metrics.jsonl to a PNG.

    **Raises:** `ImportError` naming the extra to install if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing curves needs matplotlib: pip install 'lora-jax[cli]'.") from error
    steps = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "held_out"]
    lora = [r for r in held_out if r["model"] == "lora"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = np.array([r["loss"] for r in steps])
    numbers = np.array([r["step"] for r in steps])
    left.plot(numbers, losses, color="C0", alpha=0.25, linewidth=0.8, label="each training batch")
    if len(losses) >= WINDOW:
        mean = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), mode="valid")
        left.plot(numbers[WINDOW - 1 :], mean, color="C0", label=f"mean of {WINDOW}")
    left.plot([r["step"] for r in lora], [r["loss"] for r in lora], "o-", color="C1", label="held out")
    left.set_ylabel("loss")
    right.plot([r["step"] for r in lora], [r[headline] for r in lora], "o-", color="C1", label="LoRA")
    for name, style in (("base", ":"), ("head alone", "--")):
        for record in (r for r in held_out if r["model"] == name):
            right.axhline(record[headline], linestyle=style, color="gray", label=name)
    right.set_ylabel(f"held-out {headline}")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend()
    figure.savefig(path, dpi=120)
