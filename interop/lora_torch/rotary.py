"""Rotary position embeddings come in two row orders; a weight must change order with its code.

**Half** (transformers, most Flax models): a head's first half of rows are the real parts, its second half the
imaginary parts. **Interleaved** (Meta's original Llama, llama2.c, GGUF files of the Llama family): real and
imaginary rows alternate. Only the rows of q and k (and their biases) are concerned, and of an adapter on them only
`lora_B`: its rows are the layer's outputs.

Reading the wrong order raises no error anywhere; the model just computes something else.
"""

from __future__ import annotations

from typing import Any

from .arrays import kind_of, ops_of


def rotary_to_half(array: Any, heads: int, axis: int = 0) -> Any:
    """Reorders interleaved rotary rows to halves.

    **Arguments:**

    - `array`: numpy, jax or torch array whose `axis` is heads * head size, e.g. a q or k weight in PyTorch order
        (out, in), its bias (out,), or `lora_B` (out, rank). A Flax kernel (in, out) takes `axis=1`.
    - `heads`: heads on that axis; for k under grouped queries, the key-value heads.

    **Returns:** a contiguous array of the same kind, shape and dtype; `rotary_to_interleaved` undoes it exactly.

    **Raises:** `ValueError` if `axis` is not `heads` times an even head size.
    """
    return _reorder(array, heads, axis, "half")


def rotary_to_interleaved(array: Any, heads: int, axis: int = 0) -> Any:
    """The exact inverse of `rotary_to_half`, with the same arguments."""
    return _reorder(array, heads, axis, "interleaved")


def _reorder(array: Any, heads: int, axis: int, to: str) -> Any:
    ops = ops_of(kind_of(array))
    shape = tuple(array.shape)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} does not exist in an array of shape {shape}")
    axis %= len(shape)
    if heads < 1 or shape[axis] % (2 * heads):
        raise ValueError(
            f"axis {axis} of shape {shape} has length {shape[axis]}, which is not {heads} heads of an even size; "
            "pass the number of heads of this very weight (key-value heads for k) and the axis of its outputs"
        )
    half = shape[axis] // heads // 2
    pair = (half, 2) if to == "half" else (2, half)
    split = ops.reshape(array, (*shape[:axis], heads, *pair, *shape[axis + 1 :]))
    order = list(range(len(shape) + 2))
    order[axis + 1], order[axis + 2] = axis + 2, axis + 1
    return ops.contiguous(ops.reshape(ops.transpose(split, tuple(order)), shape))
