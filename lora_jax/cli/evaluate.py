"""`lora-jax eval`: a model with and without its adapter, on the held-out rows."""

from __future__ import annotations

import json as json_module

from lora_jax.cli.training.loop import held_out
from lora_jax.cli.training.opened import open_job, refuse_fresh
from lora_jax.cli.training.show import show_results


def evaluate(source: str, *, adapter: str | None = None, step: int | None = None, json: bool = False) -> None:
    """Measure a model with and without its adapter on the held-out rows of its configuration.

    Args:
        source: A run directory of lora-jax train, or a YAML file of its options with --adapter.
        adapter: A PEFT directory to use instead of the run's newest checkpoint.
        step: Use the checkpoint of this step.
        json: Print JSON instead of a table.
    """
    refuse_fresh(source, adapter)
    config, job, learner = open_job(source, adapter=adapter, step=step)
    results = {
        name: held_out(job, learner, config.data.batch_size, adapted=adapted)
        for name, adapted in (("base", False), ("lora", True))
    }
    if json:
        print(json_module.dumps(results, indent=2))
    else:
        show_results(results)
