"""Equations that carry other equations: the interpreter goes inside, factors travel beside their base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from lora_jax import _compat
from lora_jax.recording import State
from lora_jax.rules import rule
from lora_jax.weights.virtual import Virtual, is_virtual

CALLS = ("jit", "pjit", "closed_call", "core_call", "eval_jaxpr")
REMATS = ("remat", "remat2", "checkpoint")


@rule(*CALLS)
def call(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(_compat.call_jaxpr(eqn.params))
    out = interpreter.run(jaxpr, consts, ins)
    wanted = eqn.params.get("out_shardings", ())
    return [
        lax.with_sharding_constraint(y, s) if isinstance(s, jax.sharding.Sharding) and not is_virtual(y) else y
        for y, s in zip(out, wanted or (None,) * len(out), strict=True)
    ]


@rule(*REMATS)
def remat(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])
    inside = interpreter.nested()

    # Not `run_dense`: nnx.remat returns the module's parameters, and a view of them can leave as a view.
    def body(state: State, values: list[Any]) -> tuple[list[Any], State]:
        return interpreter.recorder.around(lambda: inside.run(jaxpr, consts, values), state)

    wrapped = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    outs, interpreter.recorder.state = wrapped(interpreter.recorder.state, list(ins))
    return _with(outs, _returned(jaxpr, ins))


def _returned(jaxpr: Any, ins: Sequence[Any]) -> dict[int, Any]:
    """The virtual inputs that a body hands back untouched, by output."""
    given = dict(zip(jaxpr.invars, ins, strict=True))
    source = _sources(jaxpr)
    handed = {i: given.get(source.get(v, v)) for i, v in enumerate(jaxpr.outvars) if not isinstance(v, Literal)}
    return {i: x for i, x in handed.items() if is_virtual(x)}


def _sources(jaxpr: Any) -> dict[Any, Any]:
    """For each variable that a nested call hands through, the variable it stands for."""
    source: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in CALLS + REMATS:
            inner, _ = _compat.open_jaxpr(_compat.call_jaxpr(eqn.params))
            inside, outside = _sources(inner), dict(zip(inner.invars, eqn.invars, strict=True))
            for out, var in zip(eqn.outvars, inner.outvars, strict=True):
                given = None if isinstance(var, Literal) else outside.get(inside.get(var, var))
                if given is not None and not isinstance(given, Literal):
                    source[out] = source.get(given, given)
    return source


def _with(outs: Sequence[Any], known: dict[int, Any]) -> list[Any]:
    return [known.get(i, y) for i, y in enumerate(outs)]


@rule("cond")
def cond(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    index, *operands = ins
    if is_virtual(index):
        return None
    branches = [_compat.open_jaxpr(branch) for branch in eqn.params["branches"]]
    kept = [_returned(jaxpr, operands) for jaxpr, _ in branches]
    known = {i: x for i, x in kept[0].items() if all(other.get(i) is x for other in kept)}
    computed = [i for i in range(len(eqn.outvars)) if i not in known]

    def branch(jaxpr: Any, consts: Sequence[Any]) -> Any:
        def run(state: State, values: list[Any]) -> tuple[list[Any], State]:
            inside = interpreter.nested()

            def outputs() -> list[Any]:
                out = inside.run(jaxpr, consts, values)
                return [inside.dense(out[i], "cond") for i in computed]

            return interpreter.recorder.around(outputs, state)

        return run

    runs = [branch(*b) for b in branches]
    if platforms := eqn.params.get("branches_platforms"):
        # `lax.platform_dependent`: a branch for another platform must not be lowered for this one.
        named = {name: run for names, run in zip(platforms, runs, strict=True) for name in names or ("default",)}
        outs, state = lax.platform_dependent(interpreter.recorder.state, operands, **named)
    else:
        outs, state = lax.switch(jnp.asarray(index, jnp.int32), runs, interpreter.recorder.state, operands)
    interpreter.recorder.state = state
    return [known[i] if i in known else outs[computed.index(i)] for i in range(len(eqn.outvars))]


@rule("while")
def while_loop(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    body_jaxpr, body_outer = _compat.open_jaxpr(p["body_jaxpr"])
    cond_jaxpr, cond_outer = _compat.open_jaxpr(p["cond_jaxpr"])
    # A weight carried unchanged is a constant; one that changes has to be an array.
    moving = _moving(body_jaxpr, n_body, carry)
    start = [interpreter.dense(carry[i], "while") for i in moving]

    def whole(values: Sequence[Any]) -> list[Any]:
        out = list(carry)
        for i, value in zip(moving, values, strict=True):
            out[i] = value
        return out

    def going(values: Sequence[Any]) -> Any:
        def run() -> Any:
            return interpreter.nested().run_dense(cond_jaxpr, cond_outer, [*cond_consts, *whole(values)])[0]

        return interpreter.recorder.around(run, {})[0]  # a condition has one output

    def body_fun(carried: Any) -> Any:
        step, values, state = carried
        inside = interpreter.nested(step)

        def run() -> list[Any]:
            out = inside.run(body_jaxpr, body_outer, [*body_consts, *whole(values)])
            return [inside.dense(out[i], "while") for i in moving]

        new, state = interpreter.recorder.around(run, state)
        # Under vmap the condition is one bit per row, and a row that is done keeps its values.
        if rows := cond_jaxpr.outvars[0].aval.shape:
            _refuse_to_record(carried[2], state)
            on = going(values)
            masks = [jnp.broadcast_to(on.reshape(*rows, *(1,) * (y.ndim - len(rows))), y.shape) for y in new]
            new = [lax.select(mask, y, x) for mask, y, x in zip(masks, new, values, strict=True)]
        return step + 1, new, state

    first = (jnp.zeros((), jnp.int32), start, interpreter.recorder.state)
    _, end, interpreter.recorder.state = lax.while_loop(lambda carried: going(carried[1]).any(), body_fun, first)
    return whole(end)


def _refuse_to_record(before: State, after: State) -> None:
    if changed := [name for name in after if after[name] is not before[name]]:
        raise ValueError(
            f"`{changed[0]}` is used in a `while` loop under `vmap`, whose rows end at different steps, so its inputs "
            "cannot be told from leftovers: collect them from the loop without `vmap`."
        )


def _moving(body: Any, n_consts: int, carry: Sequence[Any]) -> list[int]:
    """The carried values that are not weights handed on unchanged."""
    rest = len(body.invars) - n_consts - len(carry)
    same = _returned(body, [*[None] * n_consts, *carry, *[None] * rest])
    return [i for i, x in enumerate(carry) if not (is_virtual(x) and same.get(i) is x)]


@rule("scan")
def scan(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    """Scans factors beside their stacked base: neither is copied, unstacked or restacked."""
    p = eqn.params
    jaxpr, outer = _compat.open_jaxpr(p["jaxpr"])
    n_consts, n_carry = _compat.scan_counts(p)
    consts, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    moving = _moving(jaxpr, n_consts, carry)
    start = [interpreter.dense(carry[i], "scan") for i in moving]
    # A stack handed back layer by layer is the stack (nnx.scan returns the module's parameters).
    n_ys = len(jaxpr.outvars) - n_carry
    same = {i - n_carry: x for i, x in _returned(jaxpr, [None] * (n_consts + n_carry) + list(xs)).items()}
    stacked = [i for i in range(n_ys) if i not in same]
    stacks = [_Stack(x) if is_virtual(x) and len(x.dims[0]) <= 1 else _Rows(interpreter.dense(x, "scan")) for x in xs]

    def whole(values: Sequence[Any]) -> list[Any]:
        out = list(carry)
        for i, value in zip(moving, values, strict=True):
            out[i] = value
        return out

    def body(carried: Any, scanned: Any) -> Any:
        state, values = carried
        step, rows = scanned
        inside = interpreter.nested(step)
        layer = [stack.layer(row) for stack, row in zip(stacks, rows, strict=True)]

        def run() -> Any:
            out = inside.run(jaxpr, outer, [*consts, *whole(values), *layer])
            return [inside.dense(out[i], "scan") for i in moving], [
                inside.dense(out[n_carry + i], "scan") for i in stacked
            ]

        (new, ys), state = interpreter.recorder.around(run, state)
        return (state, new), ys

    steps = jnp.arange(p["length"]) if interpreter.drops else None
    (interpreter.recorder.state, end), ys = lax.scan(
        body, (interpreter.recorder.state, start), (steps, [s.rows for s in stacks]),
        length=p["length"], reverse=p["reverse"], unroll=p["unroll"],
    )  # fmt: skip
    return [*whole(end), *(same[i] if i in same else ys[stacked.index(i)] for i in range(n_ys))]


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
