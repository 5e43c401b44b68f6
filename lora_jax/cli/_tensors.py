"""Safetensors files as numpy arrays, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
INTEGERS: dict[str, Any] = {
    "BOOL": np.bool_,
    **{f"{s}{n}": np.dtype(f"{s.lower()}{n // 8}") for s in "IU" for n in (8, 16, 32, 64)},
}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A `safe_open` handle. The library checks the header against the file's length when it opens it.

    **Raises:** `ValueError` if the file is truncated or no safetensors file; `OSError` if it is unreadable.
    """
    try:
        handle = safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is not a safetensors file: {error}.") from error
    with handle as file:
        yield file


def read_floats(file: Any, path: Path) -> dict[str, np.ndarray]:
    """Every tensor of an open file, in float32. **Raises:** `ValueError` for any that is not a float."""
    out: dict[str, np.ndarray] = {}
    for key in file.keys():
        kind = file.get_slice(key).get_dtype()
        if kind not in FLOATS:
            raise ValueError(f"{path}: {key} is {kind}; an adapter holds {', '.join(FLOATS)} only.")
        out[key] = file.get_tensor(key).astype(np.float32)
    return out
