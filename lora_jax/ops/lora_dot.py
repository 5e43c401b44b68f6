"""The public fused operation."""

from __future__ import annotations

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_jax.ops.choice import Choice, choose
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.dropout import threshold
from lora_jax.ops.low_rank import low_rank_contract
from lora_jax.ops.matrices import axis_sizes


def lora_dot(
    x: Float[Array, "*batch d_in"],
    kernel: Float[Array, "d_in d_out"],
    a: Float[Array, "d_in rank"],
    b: Float[Array, "rank d_out"],
    *,
    bias: Float[Array, " d_out"] | None = None,
    scale: float | jax.Array = 1.0,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*batch d_out"]:
    """Applies a frozen kernel and its low-rank correction without merging them.

    Computes `x @ kernel + scale * (drop(x) @ a) @ b (+ bias)`.

    **Arguments:**

    - `x`: activations; `kernel`: frozen weight in Flax order (PyTorch stores the transpose).
    - `a`, `b`: factors, any float dtype; cast to `x`'s dtype for the products.
    - `bias`: any float dtype, frozen or trained: its gradient is the column sum of the result's, in float32.
    - `scale`: `alpha / rank`, without unit.
    - `dropout_rate`, `key`: inverted dropout on the low-rank branch; off without a key. `x`'s last axis is the
      mask's columns, all others its rows (`lora_jax/ops/dropout.py`).
    - `implementation`: `None` chooses by platform, dtypes and sizes (`explain` says which, and why); `"xla"` is
      the plain one, `"mosaic_gpu"` fused kernels for Hopper GPUs, `"triton"` those for Ampere, Ada and Hopper
      (`lora-jax[triton]`).

    **Returns:** an array of the dtype `x @ kernel` has (`preferred_element_type` if given). Sums run in float32;
    `x @ a` and the result, bias included, are rounded once, by XLA `x @ kernel` and the branch as well.

    **Raises:** `ValueError` if inner dimensions disagree, or the implementation is unknown or can't run, with the
    reason; `TypeError` for complex operands, and for a rate that is no plain number or a scale that is none.

    **Source:** Hu et al., arXiv:2106.09685, equation 3, transposed: `x` is a row here.

    >>> import jax.numpy as jnp
    >>> lora_dot(jnp.ones((2, 3)), jnp.eye(3), jnp.zeros((3, 1)), jnp.zeros((1, 3))).shape
    (2, 3)
    """
    spec = described(
        x, kernel, a, b, bias, scale,
        dropout_rate=dropout_rate, precision=precision, preferred_element_type=preferred_element_type,
    )  # fmt: skip
    return low_rank_contract(spec, x, kernel, a, b, scale, key, implementation, bias=bias)


def explain(
    x: Any,
    kernel: Any,
    a: Any,
    b: Any,
    *,
    dropout_rate: float = 0.0,
    precision: Any = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Choice:
    """Which implementation `lora_dot` takes for these operands here, and why none of the others: print the result.

    Operands are arrays or `jax.ShapeDtypeStruct`s; nothing is computed. "Here" is the mesh in scope or else JAX's
    default device. What can't be known beforehand is left out: under `jax.vmap`, where a gradient is differentiated
    again, and where a program is lowered for another platform after all, XLA runs.

    **Raises:** as `lora_dot` does.

    >>> import jax.numpy as jnp
    >>> print(explain(jnp.ones((2, 3)), jnp.eye(3), jnp.zeros((3, 1)), jnp.zeros((1, 3))))  # on a CPU
    xla
      not mosaic_gpu: needs a Hopper GPU (H100, H200); the platform here is cpu
      not triton: needs an Ampere, Ada or Hopper GPU; the platform here is cpu
    """
    spec = described(
        x, kernel, a, b,
        dropout_rate=dropout_rate, precision=precision, preferred_element_type=preferred_element_type,
    )  # fmt: skip
    sizes = axis_sizes((spec.x, x.shape), (spec.w, kernel.shape), (spec.first, a.shape))
    return choose(spec, sizes, x, kernel, implementation, dropped=dropout_rate > 0)


def described(
    x: Any, kernel: Any, a: Any, b: Any, bias: Any = None, scale: Any = 1.0, *,
    dropout_rate: float, precision: Any, preferred_element_type: Any,
) -> Contraction:  # fmt: skip
    """The product by the names of its axes, where the operands go together. **Raises:** as `lora_dot`."""
    if kernel.ndim != 2 or x.ndim == 0:
        raise ValueError(f"x {x.shape} and kernel {kernel.shape}; expected x (..., d_in) and a kernel (d_in, d_out).")
    k, n = kernel.shape
    if x.shape[-1] != k or a.shape[0] != k or b.shape != (a.shape[1], n):
        raise ValueError(
            f"shapes disagree: x {x.shape}, kernel {kernel.shape}, a {a.shape}, b {b.shape}; expected "
            f"x (..., {k}), a ({k}, rank), b (rank, {n})."
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"`bias` has shape {bias.shape}; expected ({n},), of kernel {kernel.shape}.")
    types = [v.dtype for v in (x, kernel, a, b, bias) if v is not None]
    if any(jnp.issubdtype(each, jnp.complexfloating) for each in types):
        raise TypeError(
            f"complex operands ({', '.join(map(str, types))}): the low-rank branch is computed in real numbers. Apply "
            "the product to the real and the imaginary parts, or use the merged kernel."
        )
    _check_scale(scale)
    if not isinstance(dropout_rate, Real):
        raise TypeError(
            f"`dropout_rate` is a {type(dropout_rate).__name__}; expected a plain number, since it is part of the "
            "compiled program: `float(rate)`, and under `jax.jit` a static argument."
        )
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"`dropout_rate={dropout_rate}` must be in [0, 1).")
    if dropout_rate:
        threshold(dropout_rate)
    rows = tuple(f"m{i}" for i in range(x.ndim - 1))
    return Contraction(
        x=(*rows, "k"), w=("k", "n"), first=("k", "r"), second=("r", "n"), y=(*rows, "n"), bias=("n",),
        precision=precision, preferred_element_type=preferred_element_type, dropout_rate=dropout_rate,
    )  # fmt: skip


def _check_scale(scale: Any) -> None:
    dtype = getattr(scale, "dtype", np.void)
    number = isinstance(scale, Real) or any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))
    shape = getattr(scale, "shape", ())
    if not number or shape:
        what = f"of shape {shape} and dtype {dtype}" if hasattr(scale, "dtype") else repr(scale)
        raise TypeError(
            f"`scale` is {what}; expected one number, or of `lora_dot_group` a list or tuple with one for each kernel."
        )
