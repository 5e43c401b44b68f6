"""What each primitive does with a virtual weight: one function per primitive, grouped by family.

A rule takes the interpreter, the equation and its inputs (at least one of them virtual) and returns the outputs,
or None where the weight has to be formed in full. The interpreter does that, and reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Rule = Callable[[Any, Any, Sequence[Any]], "list[Any] | None"]
RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the names of the primitives it serves."""

    def register(fn: Rule) -> Rule:
        for name in primitives:
            assert name not in RULES, name
            RULES[name] = fn
        return fn

    return register


from lora_jax.rules import contractions as contractions  # noqa: E402
from lora_jax.rules import control_flow as control_flow  # noqa: E402
from lora_jax.rules import custom_derivatives as custom_derivatives  # noqa: E402
from lora_jax.rules import sharding as sharding  # noqa: E402
from lora_jax.rules import structural as structural  # noqa: E402
