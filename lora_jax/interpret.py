"""The jaxpr interpreter: runs a traced function with some of its inputs virtual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax import _compat
from lora_jax.recording import Recorder
from lora_jax.rules import RULES
from lora_jax.sites import Site
from lora_jax.weights.virtual import Virtual, is_virtual

Report = Callable[[Virtual, str], None]
Bind = Callable[[Any, Sequence[Any]], list[Any]]


class Interpreter:
    """Evaluates equations; those that touch a virtual weight go to their primitive's rule.

    **Arguments:**

    - `report`: called with (weight, primitive name) whenever a weight has to be formed in full.
    - `drops`: whether dropout is on, so that loops number their steps.
    - `recorder`: what observed weights record to.
    - `bind`: runs an equation on ordinary values.
    """

    def __init__(
        self, report: Report, drops: bool = False, recorder: Recorder | None = None, bind: Bind = _compat.bind
    ):
        self.report = report
        self.drops = drops
        self.recorder = recorder or Recorder()
        self.bind = bind
        self._step: Any = None
        self._outer: Interpreter | None = None
        self._uses: dict[str, int] = {}

    def nested(self, step: Any = None) -> Interpreter:
        """An interpreter for the body of `remat`, `cond` or one step of a loop (numbered by `step`)."""
        inner = Interpreter(self.report, self.drops, self.recorder, self.bind)
        inner._outer, inner._step, inner._uses = self, step, self._uses
        return inner

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Outputs of `jaxpr`; weights that pass through unchanged stay virtual."""
        env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            ins = [_compat.read(env, v) for v in eqn.invars]
            with _compat.named_as(eqn):
                outs = self.apply_rule(eqn, ins) if any(map(is_virtual, ins)) else self.bind(eqn, ins)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [_compat.read(env, v) for v in jaxpr.outvars]

    def run_dense(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Like `run`, with every output an array."""
        return [self.dense(y, "output") for y in self.run(jaxpr, consts, args)]

    def apply_rule(self, eqn: Any, ins: Sequence[Any]) -> list[Any]:
        name = eqn.primitive.name
        with eqn.ctx.manager:  # what stands in for an operation belongs to the mesh that it was traced under
            outs = RULES[name](self, eqn, ins) if name in RULES else None
        if outs is not None:
            return outs
        outs = self.bind(eqn, [self.dense(x, name) for x in ins])
        same_shape = [x for x in ins if is_virtual(x) and x.base.shape == outs[0].shape]
        if len({x.kind.name for x in same_shape}) != 1:
            return outs
        # Of a weight and its own `stop_gradient` (a batched `cond` selects between the two), the one that trains.
        w = min(same_shape, key=lambda x: x.kind.is_stopped)
        return w.kind.follow(w, eqn, outs, alone=len(same_shape) == len(ins))

    def dense(self, x: Any, primitive: str) -> Any:
        """`x` as an array; forming a weight in full is reported."""
        if not is_virtual(x):
            return x
        self.report(x, primitive)
        return x.kind.materialise(x)

    def key_for(self, w: Virtual) -> jax.Array | None:
        """The dropout key of this use of a weight: its own for each use, and for each step of each loop."""
        if w.key is None:
            return None
        use = self._uses[w.kind.name] = self._uses.get(w.kind.name, -1) + 1
        key = jax.random.fold_in(w.key, use)
        level: Interpreter | None = self
        while level is not None:
            if level._step is not None:
                key = jax.random.fold_in(key, level._step)
            level = level._outer
        return key


def site_key(key: jax.Array, site: Site) -> jax.Array:
    """The dropout key of one parameter; depends on its path only, not on what else is adapted."""
    return jax.random.fold_in(key, site.seed)
