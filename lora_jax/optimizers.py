"""Optimizers for adapters: LoRA+, which lets B learn faster than A."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from lora_jax import _compat
from lora_jax.sites import LORA_A, LORA_B


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """Multiplies the updates of everything but `lora_A` and copied matrices by `ratio`: the last link of a chain.

        tx = optax.chain(optax.adamw(schedule), lora_plus(16))

    An optimizer whose update is proportional to its learning rate (all of optax's, decoupled weight decay included)
    thereby gives B the rate `ratio * learning_rate`, schedules too. Vectors go with B, as in PEFT: biases, magnitudes.
    It works on an `Adapter`, on the state of `nnx.LoRAParam`s, and on any larger tree that holds such leaves.

    **Raises:** `ValueError` for a ratio that is not positive and finite, and at `init` for a tree without a `lora_B`.

    **Source:** Hayou et al., LoRA+, arXiv:2402.12354: a ratio well above 1, 16 in its experiments, with a learning
    rate somewhat below LoRA's. PEFT's `create_loraplus_optimizer` keeps embeddings at a rate of their own besides.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"`ratio={ratio!r}` must be a positive number, e.g. 16.")

    def init(params: Any) -> optax.EmptyState:
        names = {part for path, _ in jax.tree_util.tree_leaves_with_path(params) for part in _compat.path_names(path)}
        if LORA_B not in names:
            raise ValueError(
                f"`lora_plus` found no `{LORA_B}` among the parameters ({', '.join(sorted(names)[:6])} …): "
                "initialise the optimizer with the adapter, not with the base."
            )
        return optax.EmptyState()

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        def scaled(path: Any, x: Any) -> Any:
            return x if _is_slow(_compat.path_names(path), x) else (x * ratio).astype(x.dtype)

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, update)


def _is_slow(path: tuple[str, ...], x: Any) -> bool:
    """Whether a leaf keeps the learning rate itself: A, and copies of matrices."""
    parents = path[-2:-1]
    if LORA_A in parents:
        return True
    return LORA_B not in parents and x.ndim > 1 and not any(part.startswith("lora_") for part in parents)
