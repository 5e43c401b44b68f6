"""The training loop: steps, evaluations and checkpoints in order."""

from __future__ import annotations

import math
import time

from lora_jax.cli.training.jobs import Job, Metrics
from lora_jax.cli.training.learners import Learner, evaluate
from lora_jax.cli.training.progress import progress
from lora_jax.cli.training.run import Run, Writer

FIRST_STEPS = 1  # not counted in the throughput: they compile


def train(run: Run, job: Job, learner: Learner, writer: Writer) -> None:
    """Runs the steps that are not done yet.

    Every step and every evaluation becomes a line of the metrics. A checkpoint of step n holds all there is to know
    after n steps, so that step n + 1 is the same whether or not the run stopped between.
    """
    config, objective = run.config, job.objective
    total, rate = config.optim.steps, Throughput(config.data.batch_size * objective.units_per_row)
    if run.first_step >= total:
        return
    metrics: Metrics = {}
    with progress("train", total, done=run.first_step, every=config.log_every) as shown:
        for number in range(run.first_step, total):
            batch = job.batch(config, number)
            begun = time.monotonic()
            loss = learner.step(batch, number)
            seconds = time.monotonic() - begun
            done = number + 1
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {done}: lower optim.lr or optim.clip_norm.")
            speed = rate.after(seconds)
            writer.record("train", done, loss=loss, seconds=round(seconds, 4))
            last = done == total
            if last or done % config.eval_every == 0:
                metrics = held_out(job, learner, config.data.batch_size)
                writer.record("held_out", done, model="lora", **metrics)
            if last or done % config.checkpoint_every == 0:
                writer.save(done, learner.adapter, learner.state())
            seen = f"  held-out {objective.headline} {metrics[objective.headline]:.4g}" if metrics else ""
            shown.update(done, f"loss {loss:.4f}  {speed:,.0f} {objective.unit}/s{seen}")


def held_out(job: Job, learner: Learner, size: int, *, adapted: bool = True) -> Metrics:
    return evaluate(learner, job.objective, job.held_out, size, adapted=adapted)


class Throughput:
    """Units per second over the steps so far, without those that compile."""

    def __init__(self, units_per_step: int):
        self._units, self._times = units_per_step, []

    def after(self, seconds: float) -> float:
        self._times.append(seconds)
        counted = self._times[FIRST_STEPS:] or self._times
        return self._units * len(counted) / max(sum(counted), 1e-9)
