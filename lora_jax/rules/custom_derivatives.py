"""Functions with derivative rules of their own.

The rule belongs to the effective weight W + s·A·B, and may be anything (a straight-through estimator, a clipped
gradient), so it is honoured: forward the function is interpreted and nothing is formed, backward its own rule is
asked at the effective weight and the answer is passed on to the base and the factors. That rule knows nothing of
dropout on a branch it does not have, so there is none inside such functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from lora_jax import _compat
from lora_jax.rules import rule
from lora_jax.weights.virtual import is_virtual


@rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
def custom_derivative(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(_compat.call_jaxpr(eqn.params))
    ins = [x.kind.undropped(x) if is_virtual(x) else x for x in ins]
    if interpreter.recorder.state:  # inputs are collected going forward
        return interpreter.nested().run_dense(jaxpr, consts, ins)
    if any(is_virtual(x) and x.kind.watches for x in ins):  # nothing is differentiated
        outs = interpreter.nested().run(jaxpr, consts, ins)
        return [y.kind.seen_formed(y, "output") if is_virtual(y) else y for y in outs]

    def own(values: list[Any]) -> list[Any]:
        return _compat.bind(eqn, [x.kind.materialise(x) if is_virtual(x) else x for x in values])

    @jax.custom_vjp
    def function(values: list[Any]) -> list[Any]:
        return interpreter.nested().run_dense(jaxpr, consts, values)

    def forward(values: list[Any]) -> tuple[list[Any], list[Any]]:
        return function(values), values

    def backward(values: list[Any], cotangents: list[Any]) -> tuple[list[Any]]:
        return jax.vjp(own, values)[1](cotangents)

    function.defvjp(forward, backward)
    return function(list(ins))
