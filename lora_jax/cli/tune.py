"""`lora-jax tune`: which kernels are the fastest for given sizes on the GPU here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

SIZES = "M x K x N x R, as in 8192x4096x4096x16"


def tune(shapes: str, *, dropout: float = 0.0, dtype: str = "bfloat16", calls: int = 8, log: str | None = None) -> None:
    """Measure kernels and XLA on the GPU here, and keep for this user what was the fastest.

    Args:
        shapes: Rows, input and output features and rank of adapted layers: 8192x4096x4096x16,8192x4096x14336x16
        dropout: The rate of the training. With dropout and without are separate measurements.
        dtype: bfloat16 or float16.
        calls: How often a kernel is called in one program that is timed.
        log: A file to which to append what was measured, as JSON lines.
    """
    sizes = [parse(each) for each in shapes.split(",")]
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f"--dtype is {dtype!r}; the kernels take bfloat16 and float16")
    if calls < 1:
        raise ValueError(f"--calls is {calls}; it must be at least 1")
    from lora_jax.kernels import tuning_cache
    from lora_jax.ops import tune as measure

    found = measure(sizes, dropout_rate=dropout, dtype=dtype, calls=calls)
    if log is not None:
        about = {"commit": commit()}
        with Path(log).open("a", encoding="utf-8") as out:
            for (device, kernel, shape), entry in found.items():
                kind = "implementation" if kernel == "implementation" else "tiles"
                line = {"kind": kind, "device": device, "kernel": kernel, "shape": asdict(shape), **entry, **about}
                out.write(json.dumps(line) + "\n")
    print(f"{len(found)} measurements are in {tuning_cache.path()}; programs that start from now on use them.")


def parse(text: str) -> tuple[int, int, int, int]:
    """**Raises:** `ValueError` for what are no four positive numbers."""
    parts = text.strip().lower().split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no shape; write {SIZES}")
    m, k, n, r = map(int, parts)
    return m, k, n, r


def commit() -> str:
    """Of the checkout that the kernels are run from, or "unknown"."""
    import subprocess

    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"
