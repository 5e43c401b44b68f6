"""Text from a language model, with or without its adapter."""

from __future__ import annotations

from typing import Any

import jax

from lora_jax.cli.training.learners import Learner


class Sampler:
    """Continues a prompt; compiles once, so that before and after the training cost one compilation."""

    def __init__(self, learner: Learner, tokenizer: Any, prompt: str, tokens: int, *, adapted: bool = True):
        from lora_examples.generate import generator

        self._learner, self._tokenizer, self._tokens, self._adapted = learner, tokenizer, tokens, adapted
        self._prompt = tokenizer.encode(prompt, add_special_tokens=False).ids
        if not self._prompt:
            raise ValueError("the prompt is empty; write at least one word.")
        fn, _ = learner.pure(adapted=adapted)
        self._generate = generator(fn, len(self._prompt) + tokens)

    def __call__(self, *, temperature: float = 0.0, seed: int = 0) -> str:
        """The new text, without the prompt."""
        _, variables = self._learner.pure(adapted=self._adapted)
        key = jax.random.key(seed)
        new = self._generate(variables, self._prompt, self._tokens, temperature=temperature, key=key)
        return self._tokenizer.decode(new)
