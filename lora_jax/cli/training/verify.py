"""The last word on an export: does torch's own peft, reading only the files, compute what we compute?"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import numpy as np

from lora_jax.cli._show import console
from lora_jax.cli.training.card import CLASSES
from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.jobs import Job, chunks
from lora_jax.cli.training.learners import Learner

NEEDED = ("torch", "transformers", "peft")
# As requirements/parity.txt has them. Left to itself, pip would take a CUDA build of torch, and transformers 5 with
# packages other than the tests ran with.
INSTALL = "torch==2.13.0 transformers==4.57.6 peft==0.21.2"
TOLERANCE = 1e-4  # on float32 logits up to 5; larger ones are rounded more coarsely, in proportion
RELATIVE = {"float32": 2e-5, "bfloat16": 5e-2}
# peft ignores keys it does not know. The adapter's own effect must stand far above the allowed difference.
CLEARLY = 10


def verify(config: TrainConfig, job: Job, learner: Learner, adapter: Path, base: Path) -> None:
    """Reloads the PEFT directory in torch and compares logits on held-out rows; or says how to.

    **Raises:** `ValueError` if they differ, or if the adapter changes nothing. `ImportError` if torch, transformers or
    peft is missing and `config.verify` is `"always"`.
    """
    out = console()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if config.verify == "never":
        lines = how_to(job.base.task_type, adapter, base)
        out.print(f"not reloaded in torch (verify=never). To check the export:\n{lines}", soft_wrap=True)
        return
    if missing and config.verify == "auto":
        out.print(
            f"NOT CHECKED by PyTorch's peft: {', '.join(missing)} not installed, so the export was not reloaded there. "
            f"This installs what is missing and makes up for the check:\n  {make_up(adapter.parent)}",
            soft_wrap=True,  # a command that is cut into lines cannot be copied
        )
        return
    if missing:
        raise ImportError(f"verify=always needs {', '.join(missing)}: pip install {INSTALL}.")
    from lora_torch.reload import peft_logits

    inputs = job.objective.inputs(next(chunks(job.held_out, config.data.batch_size)))
    ours, plain = (np.asarray(learner.logits(inputs, adapted=a), np.float32) for a in (True, False))
    theirs = peft_logits(adapter, base, job.base.task_type, *map(np.asarray, inputs), dtype=config.model.dtype)
    difference, change = (float(np.abs(ours - other).max()) for other in (theirs, plain))
    out.print(
        f"reloaded in torch by peft: the largest logit difference is {difference:.2e} "
        f"(the adapter moves logits by up to {change:.3g})"
    )
    limit = max(TOLERANCE, RELATIVE[config.model.dtype] * float(np.abs(ours).max()))
    if not difference <= limit:
        raise ValueError(
            f"torch's peft computes other logits from {adapter}: they differ by {difference:.2e}, more than "
            f"{limit:.1e}. The export must not be used; please report this."
        )
    if not change > CLEARLY * limit:
        raise ValueError(
            f"the adapter moves no logit by more than {change:.2e}, so its reload proves nothing. Train longer, or "
            "with a larger optim.lr."
        )


def make_up(run: Path) -> str:
    """The one command after which a finished run has its verdict."""
    python = shlex.quote(sys.executable)
    resume = f"-m lora_jax.cli train --config {shlex.quote(str(run / 'config.yaml'))} --resume"
    return f"{python} -m pip install {INSTALL} && {python} {resume}"


def how_to(task_type: str, adapter: Path, base: Path) -> str:
    """A few lines of torch that load the export."""
    return (
        f"  from transformers import {CLASSES[task_type]}; from peft import PeftModel\n"
        f"  model = {CLASSES[task_type]}.from_pretrained({str(base)!r})\n"
        f"  model = PeftModel.from_pretrained(model, {str(adapter)!r})"
    )
