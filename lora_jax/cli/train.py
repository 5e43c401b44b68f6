"""`lora-jax train`: fine-tunes a real model, shows what it gains, and hands the adapter to PyTorch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lora_jax.cli._show import console
from lora_jax.cli.training import loop
from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.jobs import Job, prepare
from lora_jax.cli.training.learners import Learner, make_learner
from lora_jax.cli.training.progress import progress
from lora_jax.cli.training.run import Run, Writer
from lora_jax.cli.training.sample import Sampler
from lora_jax.cli.training.show import show_memory, show_plan, show_results
from lora_jax.cli.training.verify import verify


def train(config: TrainConfig) -> None:
    """Fine-tune a model with LoRA: by default all-MiniLM-L6-v2 on film reviews, in about four minutes on two cores.

    Args:
        config: The options.
    """
    begun = time.monotonic(), time.process_time()
    run = None if config.dry_run else Run.open(config)
    job = prepare(config)
    learner = make_learner(job.base, config)
    show_plan(learner.plan)
    if run is None:
        show_memory(learner, job, job.batch(config, 0))
        return
    if run.first_step:
        learner.load(*run.load_state(learner.state()))
        console().print(f"going on after step {run.first_step} of {config.optim.steps}")
    with run.writing() as writer:
        sampler = _before(run, job, learner, writer)
        loop.train(run, job, learner, writer)
        if sampler is not None and run.find(kind="sample", model="lora") is None:
            writer.record("sample", config.optim.steps, model="lora", text=sampler())
    adapter, base = _report(run, job, learner)
    seconds, cpu = time.monotonic() - begun[0], time.process_time() - begun[1]
    console().print(f"{seconds:.0f} s, {cpu:.0f} CPU-seconds; everything is in {run.directory}")
    verify(config, job, learner, adapter, base)


def _before(run: Run, job: Job, learner: Learner, writer: Writer) -> Sampler | None:
    """Measures the base, the control and a sample, unless the run that is resumed has done so."""
    config = run.config
    if run.find(kind="held_out", model="base") is None:
        writer.record("held_out", 0, model="base", **loop.held_out(job, learner, config.data.batch_size, adapted=False))
    if config.control and config.task == "classification" and run.find(kind="held_out", model="head alone") is None:
        from lora_jax.cli.training.classification import head_alone, head_batches

        total = head_batches(job, config)
        with progress("frozen encoder, for the control", total, every=5 * config.log_every) as shown:
            writer.record("held_out", 0, model="head alone", **head_alone(job, config, shown.update))
    if config.task != "causal-lm" or not config.sample.prompt:
        return None
    # A fresh adapter changes nothing, so this samples from the base.
    sampler = Sampler(learner, job.base.tokenizer, config.sample.prompt, config.sample.tokens)
    if run.find(kind="sample", model="base") is None:
        writer.record("sample", 0, model="base", text=sampler())
    return sampler


def _report(run: Run, job: Job, learner: Learner) -> tuple[Path, Path]:
    """The picture, the export, and the table of results. **Returns:** as `export_run`."""
    from lora_jax.cli.training.curves import write_curves
    from lora_jax.cli.training.export import export_run

    out = console()
    results: dict[str, dict[str, Any]] = {}
    for record in (r for r in run.records if r["kind"] == "held_out"):
        results[record["model"]] = {k: v for k, v in record.items() if k not in ("kind", "step", "model")}
    try:
        write_curves(run.records, job.objective.headline, run.directory / "curves.png")
    except ImportError as error:
        out.print(f"no curves.png: {error}")
    adapter, base = export_run(run, job, learner.adapter, learner.plan, results)
    show_results(results)
    for record in (r for r in run.records if r["kind"] == "sample"):
        out.print(f"{record['model']}: {run.config.sample.prompt}|{record['text']}")
    out.print(f"PEFT adapter: {adapter}")
    return adapter, base
