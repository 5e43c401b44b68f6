"""Equations that carry other equations: the interpreter goes inside, factors travel beside their base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax.rules import rule
from lora_jax.weights.virtual import Virtual, is_virtual


@rule("jit", "pjit", "closed_call", "core_call")
def call(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(_compat.call_jaxpr(eqn.params))
    out = interpreter.run(jaxpr, consts, ins)
    wanted = eqn.params.get("out_shardings", ())
    return [
        lax.with_sharding_constraint(y, s) if isinstance(s, jax.sharding.Sharding) and not is_virtual(y) else y
        for y, s in zip(out, wanted or (None,) * len(out), strict=True)
    ]


@rule("remat", "remat2", "checkpoint")
def remat(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])
    inside = interpreter.nested()

    def body(values: list[Any]) -> list[Any]:
        return inside.run_dense(jaxpr, consts, values)

    wrapped = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return wrapped(list(ins))


@rule("cond")
def cond(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    index, *operands = ins
    if is_virtual(index):
        return None
    branches = []
    for branch in eqn.params["branches"]:
        jaxpr, consts = _compat.open_jaxpr(branch)

        def run(values: list[Any], jaxpr=jaxpr, consts=consts) -> list[Any]:
            return interpreter.nested().run_dense(jaxpr, consts, values)

        branches.append(run)
    return lax.switch(jnp.asarray(index, jnp.int32), branches, operands)


@rule("while")
def while_loop(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    body_jaxpr, body_outer = _compat.open_jaxpr(p["body_jaxpr"])
    cond_jaxpr, cond_outer = _compat.open_jaxpr(p["cond_jaxpr"])
    # A weight carried unchanged is a constant; one that changes has to be an array.
    binders = body_jaxpr.invars[n_body:]
    fixed = [i for i, x in enumerate(carry) if is_virtual(x) and body_jaxpr.outvars[i] is binders[i]]
    moving = [i for i in range(len(carry)) if i not in fixed]
    start = [interpreter.dense(carry[i], "while") for i in moving]

    def whole(values: Sequence[Any]) -> list[Any]:
        out = list(carry)
        for i, value in zip(moving, values, strict=True):
            out[i] = value
        return out

    def cond_fun(state: Any) -> Any:
        return interpreter.nested().run_dense(cond_jaxpr, cond_outer, [*cond_consts, *whole(state[1])])[0]

    def body_fun(state: Any) -> Any:
        step, values = state
        inside = interpreter.nested(step)
        out = inside.run(body_jaxpr, body_outer, [*body_consts, *whole(values)])
        return step + 1, [inside.dense(out[i], "while") for i in moving]

    _, end = lax.while_loop(cond_fun, body_fun, (jnp.zeros((), jnp.int32), start))
    return whole(end)


@rule("scan")
def scan(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    """Scans factors beside their stacked base: neither is copied, unstacked or restacked."""
    p = eqn.params
    jaxpr, outer = _compat.open_jaxpr(p["jaxpr"])
    n_consts, n_carry = _compat.scan_counts(p)
    consts, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    binders = jaxpr.invars[n_consts : n_consts + n_carry]
    fixed = [i for i, x in enumerate(carry) if is_virtual(x) and jaxpr.outvars[i] is binders[i]]
    moving = [i for i in range(n_carry) if i not in fixed]
    start = [interpreter.dense(carry[i], "scan") for i in moving]
    stacks = [_Stack(x) if is_virtual(x) and len(x.dims[0]) <= 1 else _Rows(interpreter.dense(x, "scan")) for x in xs]

    def whole(values: Sequence[Any]) -> list[Any]:
        out = list(carry)
        for i, value in zip(moving, values, strict=True):
            out[i] = value
        return out

    def body(values: list[Any], scanned: Any) -> Any:
        step, rows = scanned
        inside = interpreter.nested(step)
        layer = [stack.layer(row) for stack, row in zip(stacks, rows, strict=True)]
        out = inside.run(jaxpr, outer, [*consts, *whole(values), *layer])
        dense = [inside.dense(y, "scan") for y in out[n_carry:]]
        return [inside.dense(out[i], "scan") for i in moving], dense

    steps = jnp.arange(p["length"]) if interpreter.drops else None
    end, ys = lax.scan(
        body, start, (steps, [s.rows for s in stacks]),
        length=p["length"], reverse=p["reverse"], unroll=p["unroll"],
    )  # fmt: skip
    return [*whole(end), *ys]


class _Rows:
    """An ordinary scanned array."""

    def __init__(self, rows: Any):
        self.rows = rows

    def layer(self, row: Any) -> Any:
        return row


class _Stack:
    """A scanned weight: factors that carry the stacked axis are scanned, the others are constants of the loop."""

    def __init__(self, w: Virtual):
        self.weight = w
        self.atoms = w.dims[0]  # none where the stack has one layer and no atom to show for it
        names = [n for atom in self.atoms for n in w.carriers(atom)]
        moved = {n: jnp.moveaxis(w.factors[n], w.axes_of(n).index(self.atoms[0]), 0) for n in names}
        self.rows = (w.base, moved)

    def layer(self, row: Any) -> Virtual:
        base, factors = row
        w = self.weight
        axes = tuple((n, tuple(a for a in names if a not in self.atoms)) for n, names in w.axes)
        return w.replace(
            base=base, factors={**w.factors, **factors}, dims=w.dims[1:], axes=axes,
            dropped=(*w.dropped, *((atom, "scan") for atom in self.atoms)),
        )  # fmt: skip
