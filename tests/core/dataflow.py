"""Reads from a jaxpr whether a weight was formed from its factors, or a base copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from lora_jax import _compat

BASE, FACTOR, DATA = "base", "factor", "data"
Tags = frozenset[str]
NONE: Tags = frozenset()


def formed_weights(adapted: Callable[..., Any], params: Any, adapter: Any, args: Any, least: int = 0) -> list[str]:
    """Equations of `adapted(params, adapter, *args)` that multiply A by B, or add factors to a base.

    An equation does so if its inputs hold the one and the other and no data: every product of a fused adapter
    has data in it. `least`: elements of a result that counts; the norms of DoRA are made of factors and bases too.
    """
    jaxpr, tags = _tagged(adapted, params, adapter, args)
    found = []
    for eqn, ins in walk(jaxpr, tags):
        factors = [t for t in ins if FACTOR in t and DATA not in t]
        bases = [t for t in ins if BASE in t and DATA not in t]
        product = eqn.primitive.name in ("dot_general", "ragged_dot_general") and len(factors) == 2
        total = eqn.primitive.name in ("add", "add_any", "sub") and factors and len(factors) + len(bases) >= 2
        if (product or total) and max(v.aval.size for v in eqn.outvars) >= least:
            found.append(str(eqn))
    return found


def copied_bases(adapted: Callable[..., Any], params: Any, adapter: Any, args: Any, size: int) -> list[str]:
    """Equations that stack, join, broadcast or update arrays of at least `size` elements made of the base alone."""
    jaxpr, tags = _tagged(adapted, params, adapter, args)
    makers = {"stack", "concatenate", "broadcast_in_dim", "dynamic_update_slice", "scatter", "copy", "gather", "pad"}
    return [
        str(eqn)
        for eqn, ins in walk(jaxpr, tags)
        if eqn.primitive.name in makers
        and any(BASE in t and DATA not in t for t in ins)
        and max(v.aval.size for v in eqn.outvars) >= size
    ]


def primitives(fn: Callable[..., Any], *args: Any) -> list[str]:
    """Names of all primitives in `fn`'s jaxpr, nested ones included."""
    jaxpr, _ = _compat.open_jaxpr(jax.make_jaxpr(fn)(*args))
    return [eqn.primitive.name for eqn, _ in walk(jaxpr, [NONE] * len(jaxpr.invars))]


def _tagged(adapted: Any, params: Any, adapter: Any, args: Any) -> tuple[Any, list[Tags]]:
    static = [not _compat.is_dynamic(x) for x in jax.tree.leaves(args)]
    leaves, tree = jax.tree.flatten(args)

    def flat(params: Any, adapter: Any, arrays: Any) -> Any:
        arrays = iter(arrays)
        filled = [x if s else next(arrays) for x, s in zip(leaves, static, strict=True)]
        return jax.tree.leaves(adapted(params, adapter, *jax.tree.unflatten(tree, filled)))

    arrays = [x for x, s in zip(leaves, static, strict=True) if not s]
    jaxpr, _ = _compat.open_jaxpr(jax.make_jaxpr(flat)(params, adapter, arrays))
    groups = ((params, BASE), (adapter, FACTOR), (arrays, DATA))
    return jaxpr, [frozenset([tag]) for part, tag in groups for _ in jax.tree.leaves(part)]


def walk(jaxpr: Any, tags: list[Tags]) -> Iterator[tuple[Any, list[Tags]]]:
    """Every equation, nested ones included, with what its inputs are made of."""
    out: list[tuple[Any, list[Tags]]] = []
    _flow(jaxpr, tags, out.append)
    return iter(out)


def _flow(jaxpr: Any, tags: list[Tags], visit: Callable[[Any], None]) -> list[Tags]:
    env = dict(zip(jaxpr.invars, tags, strict=True)) | {v: NONE for v in jaxpr.constvars}

    def read(var: Any) -> Tags:
        return NONE if isinstance(var, jax.extend.core.Literal) else env[var]

    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        visit((eqn, ins))
        outs = _nested(eqn, ins, visit)
        if outs is None:
            outs = [frozenset().union(*ins)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _nested(eqn: Any, ins: list[Tags], visit: Any) -> list[Tags] | None:
    name, p = eqn.primitive.name, eqn.params
    if name == "cond":
        per_branch = [_flow(_compat.open_jaxpr(b)[0], ins[1:], visit) for b in p["branches"]]
        return [ins[0].union(*tags) for tags in zip(*per_branch, strict=True)]
    if name == "while":
        n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
        body = _compat.open_jaxpr(p["body_jaxpr"])[0]
        carry = _fixpoint(body, ins[n_cond : n_cond + n_body], ins[n_cond + n_body :], [], visit)
        _flow(_compat.open_jaxpr(p["cond_jaxpr"])[0], [*ins[:n_cond], *carry], visit)
        return carry
    if name == "scan":
        n_consts, n_carry = _compat.scan_counts(p)
        body = _compat.open_jaxpr(p["jaxpr"])[0]
        return _fixpoint(body, ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :], visit)
    for key in ("jaxpr", "call_jaxpr"):
        if key in p:
            return _flow(_compat.open_jaxpr(p[key])[0], ins, visit)
    return None


def _fixpoint(body: Any, consts: list[Tags], carry: list[Tags], xs: list[Tags], visit: Any) -> list[Tags]:
    """Tags of a loop's outputs: the carry's grow until nothing is added."""
    while True:
        out = _flow(body, [*consts, *carry, *xs], lambda _: None)
        grown = [old | new for old, new in zip(carry, out[: len(carry)], strict=True)]
        if grown == carry:
            break
        carry = grown
    out = _flow(body, [*consts, *carry, *xs], visit)
    return [*carry, *out[len(carry) :]]
