"""The two front ends behind one interface: take a step, evaluate, say what to save.

The base's parameters are an argument of every compiled function. Closed over, XLA would fold them into the
program as constants: 22 seconds to the first step of SmolLM2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax

import lora_jax
from lora_jax.adapters import Adapter
from lora_jax.cli.training.config import OptimOptions, TrainConfig
from lora_jax.cli.training.jobs import Base, Batch, Metrics, Objective, chunks
from lora_jax.planning import Plan


class Learner(Protocol):
    """An adapted model in training.

    - `step(batch, number)`: trains on a batch and returns its loss. `number` counts from 0 and decides the dropout.
    - `logits(inputs)`: compiled, without dropout; of the base alone unless `adapted`.
    - `pure()`: `(fn, variables)` such that `fn(variables, *inputs)` are those logits, to be compiled elsewhere.
    - `state()`: what a resumed run needs besides the adapter, as a pytree of arrays; `load` takes both back. After
      it, steps give the same losses, bit for bit, as if the run had never stopped.
    - `compiled_step(batch)`: the training step compiled, for its memory analysis.
    """

    @property
    def plan(self) -> Plan: ...

    @property
    def adapter(self) -> Adapter: ...

    def step(self, batch: Batch, number: int) -> float: ...

    def logits(self, inputs: tuple[Any, ...], *, adapted: bool = True) -> jax.Array: ...

    def pure(self, *, adapted: bool = True) -> tuple[Callable[..., jax.Array], Any]: ...

    def state(self) -> Any: ...

    def load(self, adapter: Adapter, state: Any) -> None: ...

    def compiled_step(self, batch: Batch) -> Any: ...


def make_learner(base: Base, config: TrainConfig) -> Learner:
    """The learner of `config.model.front_end`, with a fresh adapter."""
    if config.model.front_end == "nnx":
        from lora_jax.cli.training.nnx_learner import NnxLearner

        return NnxLearner(base, config)
    return LinenLearner(base, config)


def make_optimizer(options: OptimOptions) -> optax.GradientTransformation:
    """AdamW with a warm-up, a schedule and a limit on the gradients' norm."""
    steps, warmup = options.steps, min(options.warmup_steps, options.steps - 1)
    after = {
        "constant": optax.constant_schedule(options.lr),
        "linear": optax.linear_schedule(options.lr, 0.0, steps - warmup),
        "cosine": optax.cosine_decay_schedule(options.lr, steps - warmup),
    }[options.schedule]
    # From the first step on: a rate of exactly zero would waste it.
    rise = optax.linear_schedule(options.lr / (warmup + 1), options.lr, warmup)
    rate = optax.join_schedules([rise, after], [warmup]) if warmup else after
    adamw = optax.adamw(rate, weight_decay=options.weight_decay)
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), adamw) if options.clip_norm > 0 else adamw


def evaluate(learner: Learner, objective: Objective, rows: Batch, size: int, *, adapted: bool = True) -> Metrics:
    """Metrics over all `rows`, `size` at a time; of the base alone unless `adapted`. Sums run in float64."""
    totals = jax.jit(objective.totals)
    sums: dict[str, float] = {}
    for batch in chunks(rows, size):
        logits = learner.logits(objective.inputs(batch), adapted=adapted)
        for name, value in totals(logits, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return objective.metrics(sums)


class LinenLearner:
    """`lora_jax.linen.adapt` and optax: everything that changes is passed in and returned."""

    def __init__(self, base: Base, config: TrainConfig):
        self._params = base.params
        init, self._dropout = jax.random.split(jax.random.key(config.seed))
        self._model, self._adapter = lora_jax.linen.adapt(base.model, base.params, config.lora, *base.inputs, key=init)
        optimizer = make_optimizer(config.optim)
        self._optimizer_state = optimizer.init(self._adapter)
        model, objective, drops = self._model, base.objective, config.lora.dropout > 0

        def step(adapter: Adapter, state: Any, params: Any, batch: Batch, key: jax.Array) -> tuple[Any, ...]:
            def loss(adapter: Adapter) -> jax.Array:
                variables = {"params": params, "lora": adapter}
                rngs = {"lora": key} if drops else None
                return objective.loss(model.apply(variables, *objective.inputs(batch), rngs=rngs), batch)

            value, gradient = jax.value_and_grad(loss)(adapter)
            updates, state = optimizer.update(gradient, state, adapter)
            return optax.apply_updates(adapter, updates), state, value

        def adapted(variables: Any, *inputs: Any) -> Any:
            return model.apply(variables, *inputs)

        def plain(variables: Any, *inputs: Any) -> Any:
            return model.module.apply(variables, *inputs)

        self._plain, self._adapted = plain, adapted
        self._step = jax.jit(step, donate_argnums=(0, 1))

    @property
    def plan(self) -> Plan:
        return self._model.plan

    @property
    def adapter(self) -> Adapter:
        return self._adapter

    def step(self, batch: Batch, number: int) -> float:
        key = jax.random.fold_in(self._dropout, number)
        self._adapter, self._optimizer_state, loss = self._step(
            self._adapter, self._optimizer_state, self._params, batch, key
        )
        return float(loss)

    def logits(self, inputs: tuple[Any, ...], *, adapted: bool = True) -> jax.Array:
        fn, variables = self.pure(adapted=adapted)
        return jax.jit(fn)(variables, *inputs)

    def pure(self, *, adapted: bool = True) -> tuple[Callable[..., jax.Array], Any]:
        if adapted:
            return self._adapted, {"params": self._params, "lora": self._adapter}
        return self._plain, {"params": self._params}

    def state(self) -> Any:
        return self._optimizer_state

    def load(self, adapter: Adapter, state: Any) -> None:
        self._adapter, self._optimizer_state = adapter, state

    def compiled_step(self, batch: Batch) -> Any:
        arguments = (self._adapter, self._optimizer_state, self._params, batch, self._dropout)
        return self._step.lower(*arguments).compile()
