"""The nnx front end as a `Learner`: a module and an `nnx.Optimizer` that change in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import lora_jax
from lora_jax.adapters import Adapter
from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.jobs import Base, Batch
from lora_jax.cli.training.learners import make_optimizer
from lora_jax.planning import Plan


class NnxLearner:
    """`lora_jax.nnx.adapt` and `nnx.Optimizer(wrt=nnx.LoRAParam)`."""

    def __init__(self, base: Base, config: TrainConfig):
        objective = base.objective
        self._model = lora_jax.nnx.adapt(base.model, config.lora, *base.inputs, rngs=nnx.Rngs(config.seed))
        self._optimizer = nnx.Optimizer(self._model, make_optimizer(config.optim), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model: Any, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
            def loss(model: Any) -> jax.Array:
                return objective.loss(model(*objective.inputs(batch)), batch)

            value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
            optimizer.update(model, gradient)
            return value

        self._step = step
        self._logits = nnx.jit(lambda model, inputs: model(*inputs))

    @property
    def plan(self) -> Plan:
        return lora_jax.nnx.plan_of(self._model)

    @property
    def adapter(self) -> Adapter:
        return lora_jax.nnx.adapter_of(self._model)

    def step(self, batch: Batch, number: int) -> float:
        # The module counts its own dropout draws, so `number` is not needed.
        self._model.train()
        return float(self._step(self._model, self._optimizer, batch))

    def logits(self, inputs: tuple[Any, ...], *, adapted: bool = True) -> jax.Array:
        self._model.eval()
        return self._logits(self._model if adapted else self._model.base, inputs)

    def pure(self, *, adapted: bool = True) -> tuple[Callable[..., jax.Array], Any]:
        self._model.eval()
        graphdef, state = nnx.split(self._model if adapted else self._model.base)

        def fn(state: Any, *inputs: Any) -> jax.Array:
            return nnx.merge(graphdef, state)(*inputs)

        return fn, state

    def state(self) -> Any:
        """The optimizer's state, and how many numbers each random stream has given."""
        counts = nnx.state(self._model, nnx.RngCount)
        return {"optimizer": nnx.state(self._optimizer), "random": counts}

    def load(self, adapter: Adapter, state: Any) -> None:
        lora_jax.nnx.set_adapter(self._model, adapter)
        nnx.update(self._optimizer, state["optimizer"])
        nnx.update(self._model, state["random"])

    def compiled_step(self, batch: Batch) -> Any:
        self._model.train()
        return self._step.lower(self._model, self._optimizer, batch).compile()
