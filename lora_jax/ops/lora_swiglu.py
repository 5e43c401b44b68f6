"""A gated MLP of three adapted kernels that keeps no more between its passes than it must."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.ops.lora_dot import lora_dot
from lora_jax.ops.lora_dot_group import lora_dot_group
from lora_jax.ops.low_rank import SAVED


class LoraKernel(NamedTuple):
    """A frozen kernel (d_in, d_out), its factors (d_in, rank) and (rank, d_out), and what `lora_dot` takes besides."""

    kernel: jax.Array
    a: jax.Array
    b: jax.Array
    bias: jax.Array | None = None
    scale: float | jax.Array = 1.0


def lora_swiglu(
    x: Float[Array, "*batch d_model"],
    gate: LoraKernel,
    up: LoraKernel,
    down: LoraKernel,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
    precision: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*batch d_model"]:
    """`down(activation(gate(x)) * up(x))`, each the product of a frozen kernel and its adapter.

    `gate` and `up` read `x` as `lora_dot_group` does. Between the passes are kept `x`, the results of `gate` and `up`,
    and of each product the thin `x @ a`; the activation and its product, which is what `down` multiplies, are computed
    again on the way back. Written out, the same layer keeps them as well, with `silu` five or six arrays as large as
    `up(x)` instead of two. That shows under `lax.scan`, `jax.vjp` and the like; within one program XLA computes
    elementwise operations again by itself.

    **Arguments:**

    - `x`: activations; `gate`, `up`: of kernels (d_model, d_hidden), `down`: (d_hidden, d_model).
    - `activation`: of `gate`, elementwise.
    - `dropout_rate`, `key`: as in `lora_dot`; one mask for `gate` and `up`, another one for `down`.

    **Returns:** an array of `x.dtype`. The activation and its product with `up(x)` are computed in float32 and rounded
    once.

    **Raises:** as `lora_dot` does.

    **Source:** Shazeer, arXiv:2002.05202, section 2.

    >>> import jax.numpy as jnp
    >>> wide = LoraKernel(jnp.ones((3, 5)), jnp.zeros((3, 1)), jnp.zeros((1, 5)))
    >>> back = LoraKernel(jnp.ones((5, 3)), jnp.zeros((5, 1)), jnp.zeros((1, 3)))
    >>> lora_swiglu(jnp.ones((2, 3)), wide, wide, back).shape
    (2, 3)
    """
    settings = {"dropout_rate": dropout_rate, "precision": precision, "implementation": implementation}
    first, second = (None, None) if key is None else jax.random.split(key)
    opened, raised = lora_dot_group(
        x, [gate.kernel, up.kernel], [gate.a, up.a], [gate.b, up.b],
        biases=[gate.bias, up.bias], scale=[gate.scale, up.scale], key=first, **settings,
    )  # fmt: skip

    # `h` of `down` is thin: keeping it costs little, computing it again another pass over what `down` multiplies.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SAVED))
    def out(opened: jax.Array, raised: jax.Array, down: LoraKernel, key: jax.Array | None) -> jax.Array:
        wide = jnp.promote_types(opened.dtype, jnp.float32)
        hidden = (activation(opened.astype(wide)) * raised.astype(wide)).astype(opened.dtype)
        return lora_dot(hidden, down.kernel, down.a, down.b, bias=down.bias, scale=down.scale, key=key, **settings)

    return out(opened, raised, down, second)
