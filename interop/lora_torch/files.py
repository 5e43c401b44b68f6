"""JSON and safetensors files, opened strictly: whatever is wrong with one is an error that names it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
INTEGERS: dict[str, Any] = {
    "BOOL": np.bool_,
    **{f"{s}{n}": np.dtype(f"{s.lower()}{n // 8}") for s in "IU" for n in (8, 16, 32, 64)},
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    **Raises:** `ValueError` if there is none in it or a key of one stands twice, `OSError` if it is unreadable.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are both ValueErrors
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object.")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which no key stands twice: readers differ in which of the two they take."""
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"it has {', '.join(map(repr, twice))} twice")
    return out


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A `safe_open` handle that gives numpy arrays, bfloat16 as `ml_dtypes.bfloat16`.

    **Raises:** `ValueError` if the file is truncated or no safetensors file; `OSError` if it is unreadable.
    """
    # The library checks the header's length and every offset against the file before a tensor is made.
    try:
        handle = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is no safetensors file: {error}.") from error
    with handle as file:
        yield file


def read_floats(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file in the dtype it has there. **Raises:** `ValueError` for any that is not a float."""
    with open_safetensors(path) as file:
        kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}
        if wrong := {key: kind for key, kind in kinds.items() if kind not in FLOATS}:
            listed = ", ".join(f"{key} ({kind})" for key, kind in wrong.items())
            raise ValueError(f"{path}: factors are {', '.join(FLOATS)}; not so {listed}.")
        return {key: np.asarray(file.get_tensor(key), FLOATS[kind]) for key, kind in kinds.items()}
