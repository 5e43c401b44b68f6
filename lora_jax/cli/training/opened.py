"""A model with its adapter, as other commands open it: a run, or a configuration and a PEFT directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lora_jax import checkpoint
from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.config_files import read_config
from lora_jax.cli.training.jobs import Base, Job, prepare, prepare_base
from lora_jax.cli.training.learners import Learner, make_learner
from lora_jax.cli.training.run import Run
from lora_jax.planning import Plan


def config_of(source: str) -> TrainConfig:
    """The configuration of a run directory, or in a YAML file."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source} does not exist; name the directory of a run, or a YAML file of its options.")
    return Run.read(path).config if path.is_dir() else read_config(path)


def refuse_fresh(source: str, adapter: str | None) -> None:
    """**Raises** `ValueError` for a YAML file alone: with a fresh adapter the model would be its base."""
    if adapter is None and Path(source).is_file():
        raise ValueError(
            f"{source} says which model, but not which adapter: name the directory of a run, or add --adapter "
            "PEFT_DIRECTORY."
        )


def open_job(source: str, *, adapter: str | None = None, step: int | None = None) -> tuple[TrainConfig, Job, Learner]:
    """Model, data and adapter; see `open_base`."""
    config = config_of(source)
    job = prepare(config)
    return config, job, _learner(source, config, job.base, adapter, step)


def open_base(source: str, *, adapter: str | None = None, step: int | None = None) -> tuple[TrainConfig, Base, Learner]:
    """Model and adapter.

    **Arguments:**

    - `source`: a run directory, or a YAML file of `lora-jax train`.
    - `adapter`: a PEFT directory to use instead of the run's own checkpoint.
    - `step`: which checkpoint; the newest if None.

    Without any of them (a YAML file alone) the adapter is fresh: the model is its base.

    **Raises:** `ValueError` or `OSError` for what is missing or does not fit together.
    """
    config = config_of(source)
    base = prepare_base(config)
    return config, base, _learner(source, config, base, adapter, step)


def plan_for_peft(base: Base, directory: str) -> Plan:
    """The plan that adapts in `base` what a PEFT directory adapts, by the linen or the nnx model's own names."""
    from flax import nnx

    from lora_torch import plan_peft

    if not isinstance(base.model, nnx.Module):

        def linen_model(params: Any, *inputs: Any) -> Any:
            return base.model.apply({"params": params}, *inputs)

        return plan_peft(directory, linen_model, base.params, *base.inputs)
    graphdef, params, rest = nnx.split(base.model, nnx.Param, ...)

    def nnx_model(params: Any, *inputs: Any) -> Any:
        return nnx.merge(graphdef, params, rest)(*inputs)

    return plan_peft(directory, nnx_model, params, *base.inputs)


def _learner(source: str, config: TrainConfig, base: Base, adapter: str | None, step: int | None) -> Learner:
    if adapter is not None:
        if step is not None:
            raise ValueError("--step chooses a checkpoint of the run, --adapter a PEFT directory: give one of them.")
        from lora_torch import load_peft

        learner = make_learner(base, dataclasses.replace(config, lora=plan_for_peft(base, adapter).config))
        learner.load(load_peft(adapter, learner.plan, params=base.params), learner.state())
        return learner
    learner = make_learner(base, config)
    if Path(source).is_dir():
        learner.load(checkpoint.restore(Run.read(Path(source)).checkpoint(step)), learner.state())
    return learner
