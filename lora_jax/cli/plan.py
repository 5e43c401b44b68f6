"""`lora-jax plan`: what a configuration adapts, and what it leaves out and why."""

from __future__ import annotations

from dataclasses import dataclass

from lora_jax.cli._show import console
from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.jobs import prepare_base
from lora_jax.cli.training.learners import make_learner
from lora_jax.cli.training.show import show_plan


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """The options of `lora-jax train`, so that the same YAML files fit.

    Args:
        all_rows: One line for every parameter of the model, with the reason where it is left out.
    """

    all_rows: bool = False


def plan(config: PlanConfig) -> None:
    """Show which parameters a configuration adapts, and why it leaves out the others. Nothing is trained.

    Args:
        config: The options.
    """
    found = make_learner(prepare_base(config), config).plan
    if config.all_rows:
        console().print(str(found))
    else:
        show_plan(found)
