"""`lora-jax generate`: continues a text with a language model and its adapter."""

from __future__ import annotations

from lora_jax.cli._show import console
from lora_jax.cli.training.opened import open_base, refuse_fresh
from lora_jax.cli.training.sample import Sampler


def generate(
    source: str,
    *,
    prompt: str | None = None,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    adapter: str | None = None,
    step: int | None = None,
    base: bool = False,
) -> None:
    """Continue a text with a language model and its adapter.

    Args:
        source: A run directory of lora-jax train, or a YAML file of its options with --adapter or
            --base (task causal-lm).
        prompt: The text to continue; that of the configuration if null.
        tokens: How many tokens to add at most.
        temperature: 0 always takes the likeliest token; 1 samples from the model's own distribution.
        seed: Of the sampling.
        adapter: A PEFT directory to use instead of the run's newest checkpoint.
        step: Use the checkpoint of this step.
        base: Leave the adapter out.
    """
    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: it must be at least 1.")
    if not base:
        refuse_fresh(source, adapter)
    config, model, learner = open_base(source, adapter=adapter, step=step)
    if config.task != "causal-lm":
        raise ValueError(f"{source} is a run of task={config.task}; only task=causal-lm generates text.")
    text = config.sample.prompt if prompt is None else prompt
    sampler = Sampler(learner, model.tokenizer, text, tokens, adapted=not base)
    console().print(text + sampler(temperature=temperature, seed=seed))
