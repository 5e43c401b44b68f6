"""jax-triton's one function as version 0.3 documents it, carried out by Triton's interpreter on the CPU.

Arrays are passed to the kernel in their order, the result's pointer behind them; all else is given by name. For
`tests/kernels/interpreted.py`, which lets it be found. Results start as NaN.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
import torch

os.environ["TRITON_CACHE_DIR"] = ""  # so does 0.3


def triton_call(
    *arrays: jax.Array,
    kernel: Any,
    out_shape: jax.ShapeDtypeStruct,
    grid: tuple[int, ...],
    name: str = "",
    num_warps: int | None = None,
    num_stages: int | None = None,
    compute_capability: int | None = None,
    **metaparams: Any,
) -> jax.Array:
    assert all(isinstance(array, jax.Array) for array in arrays), arrays
    assert name and num_warps and num_stages

    def run(*operands: Any) -> np.ndarray:
        tensors = [torch.from_numpy(np.array(operand)) for operand in operands]
        out = torch.from_numpy(np.full(out_shape.shape, np.nan, out_shape.dtype))
        kernel[grid](*tensors, out, **metaparams)
        return out.numpy()

    return jax.pure_callback(run, out_shape, *arrays)
