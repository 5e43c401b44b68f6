"""The description of one adapted product: names for its axes, and its static settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lora_jax.ops.contract import Axes


@dataclass(frozen=True)
class Contraction:
    """The axis names of one adapted product and its static settings.

    `first` is the factor that shares contracted axes with `x`, `second` the other one; which of A and B
    that is depends on the side of the weight that is contracted (a tied head contracts B's). `summed` is the order
    in which `x·w` sums its axes, so that a zero adapter gives the base's very bits; empty for `w`'s order.
    """

    x: Axes
    w: Axes
    first: Axes
    second: Axes
    y: Axes
    # Of the bias, which lie in `y`; empty without one.
    bias: Axes = ()
    summed: Axes = ()
    precision: Any = None
    preferred_element_type: Any = None
    dropout_rate: float = 0.0
    # On meshes with explicit axes: the result's sharding where the model states it, and `x`'s.
    out_sharding: Any = None
    x_sharding: Any = None

    @property
    def columns(self) -> tuple[int, ...]:
        """Positions of the axes of `x` that are summed over: the columns of its dropout mask."""
        return tuple(i for i, name in enumerate(self.x) if name not in self.y)

    @property
    def h(self) -> Axes:
        """Axes of `x·first`: what the result or the second factor still needs."""
        seen = dict.fromkeys((*self.x, *self.first))
        needed = set(self.y) | set(self.second)
        return tuple(name for name in seen if name in needed)


def compute_dtype(x: Any) -> Any:
    """That of the low-rank branch: `x`'s, or float32 where it is none that a product is computed in."""
    return x.dtype if x.dtype in (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16) else jnp.dtype(jnp.float32)


def wide(dtype: Any) -> Any:
    """The dtype of sums."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
