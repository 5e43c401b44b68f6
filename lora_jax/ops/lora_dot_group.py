"""The public operation for several adapted kernels that take the same data: query, key and value; gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jaxtyping import Array, Float

from lora_jax.ops.choice import Choice, choose_group
from lora_jax.ops.lora_dot import described, explain, lora_dot
from lora_jax.ops.low_rank import low_rank_group
from lora_jax.ops.matrices import axis_sizes


def lora_dot_group(
    x: Float[Array, "*batch d_in"],
    kernels: Sequence[Float[Array, "d_in d_out"]],
    a: Sequence[Float[Array, "d_in rank"]],
    b: Sequence[Float[Array, "rank d_out"]],
    *,
    biases: Sequence[Float[Array, " d_out"] | None] | None = None,
    scale: float | jax.Array | list[Any] | tuple[Any, ...] = 1.0,
    dropout_rate: float = 0.0,
    key: jax.Array | list[jax.Array] | tuple[jax.Array, ...] | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch d_out"], ...]:
    """`lora_dot` of one `x` with each of several kernels, where the adapters read `x` once.

    Computes `x @ kernels[i] + scale[i] * (drop(x) @ a[i]) @ b[i] (+ biases[i])`. One pass over `x` gives `drop(x) @ a`
    of all, one all gradients of `a`; fused kernels give the gradient of `x` as one product, which is not written and
    read again to be added up. `d_out` and `rank` may differ.

    **Arguments:** as for `lora_dot`, one for each kernel, and:

    - `scale`: a number for all, or a list or tuple with one for each.
    - `key`: one for all, with one mask, or a list or tuple with one for each (as separate layers have them). Then
      there are as many masks, and `x` is read for each kernel.
    - `implementation`: fused kernels take up to 256 ranks together, each counted as 16, or as the next multiple of 64
      where one of them is over 16; `explain_group` says whether they do.

    **Returns:** one array for each kernel, as `lora_dot` does.

    **Raises:** as `lora_dot` does, and `ValueError` where the lists differ in length.

    >>> import jax.numpy as jnp
    >>> a, b = jnp.zeros((3, 1)), jnp.zeros((1, 3))
    >>> q, k = lora_dot_group(jnp.ones((2, 3)), [jnp.eye(3), jnp.ones((3, 3))], [a, a], [b, b])
    >>> q.shape, k.shape
    ((2, 3), (2, 3))
    """
    count = len(kernels)
    biases = [None] * count if biases is None else biases
    scales = scale if isinstance(scale, list | tuple) else [scale] * count
    _check_lengths(count, a=a, b=b, biases=biases, scale=scales)
    settings = {"precision": precision, "preferred_element_type": preferred_element_type}
    if isinstance(key, list | tuple):
        _check_lengths(count, key=key)
        settings |= {"dropout_rate": dropout_rate, "implementation": implementation}
        each = zip(kernels, a, b, biases, scales, key, strict=True)
        return tuple(lora_dot(x, w, a, b, bias=bias, scale=s, key=key, **settings) for w, a, b, bias, s, key in each)
    specs = [
        described(x, *each, dropout_rate=dropout_rate, **settings)
        for each in zip(kernels, a, b, biases, scales, strict=True)
    ]
    return tuple(low_rank_group(specs[0], x, kernels, a, b, scales, biases, key, implementation))


def explain_group(
    x: Any,
    kernels: Sequence[Any],
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    dropout_rate: float = 0.0,
    separate_keys: bool = False,
    precision: Any = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> tuple[Choice, ...]:
    """What `lora_dot_group` takes for each kernel, as `explain` says it, and what they share: print the results.

    `separate_keys`: that there is to be a dropout key for each.

    **Raises:** as `lora_dot_group` does.

    >>> import jax.numpy as jnp
    >>> x, w, a, b = jnp.ones((2, 3)), jnp.eye(3), jnp.zeros((3, 1)), jnp.zeros((1, 3))
    >>> print(explain_group(x, [w, w], [a, a], [b, b])[1])  # on a CPU
    xla
      one product gives h of all 2, and one all dA
      not mosaic_gpu: needs a Hopper GPU (H100, H200); the platform here is cpu
    """
    _check_lengths(len(kernels), a=a, b=b)
    settings = {
        "dropout_rate": dropout_rate, "precision": precision, "preferred_element_type": preferred_element_type,
    }  # fmt: skip
    if separate_keys and dropout_rate:
        why = f"the data is read for each of the {len(kernels)} products: each has a dropout mask of its own"
        choices = (
            explain(x, *each, implementation=implementation, **settings) for each in zip(kernels, a, b, strict=True)
        )
        return tuple(replace(choice, group=why) for choice in choices)
    specs = [described(x, *each, **settings) for each in zip(kernels, a, b, strict=True)]
    spec = specs[0]
    sizes = [
        axis_sizes((spec.x, x.shape), (spec.w, w.shape), (spec.first, first.shape))
        for w, first in zip(kernels, a, strict=True)
    ]
    return tuple(choose_group(spec, sizes, x, kernels, implementation, dropped=dropout_rate > 0)[1])


def _check_lengths(count: int, **lists: Sequence[Any]) -> None:
    if not count:
        raise ValueError("`kernels` is empty: a group has at least one.")
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(f"`{name}` has {len(values)} entries for {count} kernels; expected one for each.")
