"""`lora-jax export`: an adapter from a run or orbax checkpoint to a PEFT directory, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lora_jax import checkpoint
from lora_jax.cli._show import console
from lora_jax.cli.training.opened import config_of, open_base, plan_for_peft


def export(
    source: str,
    out_dir: str,
    *,
    target: Literal["peft", "vllm", "gguf"] | None = None,
    model: str | None = None,
    step: int | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Convert an adapter: a run or an orbax checkpoint to a PEFT directory, a PEFT directory to an orbax checkpoint.

    Args:
        source: A run directory, a checkpoint of an adapter, or a PEFT directory.
        out_dir: The directory to write; it must not exist yet.
        target: Who will read the PEFT directory; peft if null.
        model: For a PEFT directory, the run or YAML file whose model it adapts.
        step: For a run, the checkpoint of this step; the newest if null.
        base_model_name_or_path: What the PEFT directory calls its base; for a run, the run's own.
        task_type: PEFT's, such as CAUSAL_LM; for a run, the run's own.
    """
    out = Path(out_dir)
    if out.exists():
        raise ValueError(f"{out} exists already; name a new directory, nothing is overwritten.")
    path = Path(source)
    names = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    if (path / "adapter_config.json").is_file():
        _refuse(f"{source} is a PEFT directory and becomes a checkpoint", target=target, step=step, **names)
        _from_peft(source, out, model)
    elif (path / "config.yaml").is_file():
        _refuse(f"{source} is a run, which knows its model", model=model)
        _from_run(source, out, target or "peft", step, base_model_name_or_path, task_type)
    else:
        _refuse(f"{source} is one checkpoint, whose adapter needs no model", model=model, step=step)
        _from_checkpoint(path, out, target or "peft", names)
    console().print(f"wrote {out}")


def _refuse(why: str, **options: Any) -> None:
    """**Raises** `ValueError` for options that would have no effect."""
    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        raise ValueError(f"{why}: {', '.join(given)} would have no effect here, leave it out.")


def _from_peft(source: str, out: Path, model: str | None) -> None:
    from lora_torch import load_peft

    if model is None:
        raise ValueError(f"{source} is a PEFT directory: say whose adapter it is, --model RUN_OR_YAML.")
    from lora_jax.cli.training.jobs import prepare_base

    base = prepare_base(config_of(model))
    plan = plan_for_peft(base, source)
    checkpoint.save(out, load_peft(source, plan, params=base.params), config=plan.config)


def _from_run(source: str, out: Path, target: Any, step: int | None, name: str | None, task_type: str | None) -> None:
    from lora_torch import save_peft

    _, base, learner = open_base(source, step=step)
    written = Path(source) / "base"
    own = base.name if base.directory is not None or not written.is_dir() else str(written)
    save_peft(
        learner.adapter, out, learner.plan, target=target, base_model_name_or_path=name or own,
        task_type=task_type or base.task_type,
    )  # fmt: skip


def _from_checkpoint(path: Path, out: Path, target: Any, names: dict[str, Any]) -> None:
    from lora_torch import save_peft

    save_peft(checkpoint.restore(path), out, checkpoint.read_config(path), target=target, **names)
