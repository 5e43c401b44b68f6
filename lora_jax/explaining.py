"""`explain`: which implementation each product of an adapted model runs on, and why not another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.functional import apply
from lora_jax.ops.choice import Choice, recording
from lora_jax.planning import Plan


@dataclass(frozen=True)
class Explanation:
    """`print` it. `choices`: one for each use of an adapted parameter, in the order of the model."""

    choices: tuple[Choice, ...]

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """M, K, N and R of the products that are ones of matrices, each once: what `lora_jax.ops.tune` takes."""
        return tuple(dict.fromkeys(each.sizes for each in self.choices if each.sizes is not None))

    def __str__(self) -> str:
        lines: dict[str, int] = {}
        for choice in self.choices:
            line = f"{choice.name}: {choice}"
            lines[line] = lines.get(line, 0) + 1
        return "\n".join(line if n == 1 else f"{line}\n  {n} such uses" for line, n in lines.items())


def explain(fn: Callable[..., Any], plan: Plan, *, implementation: str | None = None) -> Callable[..., Explanation]:
    """`explain(fn, plan)(params, adapter, *args, key=None, **kwargs)` says what `apply(fn, plan)` would run, and why.

    The arguments are those of the adapted function, arrays or `jax.ShapeDtypeStruct`s: it is traced and not run. What
    counts is where that happens: the mesh in scope, or else JAX's default device.

    **Raises:** as `apply` and its result do.
    """
    adapted = apply(fn, plan, implementation=implementation)

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        with recording() as choices:
            jax.eval_shape(lambda args, kwargs: adapted(*args, **kwargs), args, kwargs)
        return Explanation(tuple(choices))

    return explained
