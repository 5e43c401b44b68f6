"""The adapter as a PEFT directory, with a model card, and the base beside it where torch has none to load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lora_jax.adapters import Adapter
from lora_jax.cli.training.card import model_card
from lora_jax.cli.training.jobs import Base, Job
from lora_jax.cli.training.run import Run
from lora_jax.planning import Plan


def export_run(
    run: Run, job: Job, adapter: Adapter, plan: Plan, results: dict[str, dict[str, Any]]
) -> tuple[Path, Path]:
    """Writes `adapter/`, and `base/` if need be; replaces what an earlier export left.

    **Returns:** the PEFT directory, and the directory of its base.
    """
    from lora_torch.peft_dir import save_peft

    base = base_directory(job.base, run.directory / "base")
    name = job.base.name if job.base.directory is not None else str(base)
    card = model_card(run.config, job.base, name, plan, results)
    options = {"base_model_name_or_path": name, "task_type": job.base.task_type, "model_card": card, "overwrite": True}
    return save_peft(adapter, run.directory / "adapter", plan, **options), base


def base_directory(base: Base, target: Path) -> Path:
    """Where torch finds the base: its own directory, or `target`, written if it is not there yet."""
    if base.directory is not None:
        return base.directory
    assert base.write is not None
    if not target.is_dir():
        partial = target.with_name(target.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial)
        base.write(partial)
        partial.rename(target)
    return target
