"""Continues a text with a causal language model: greedy, or sampled at a temperature.

Every new token recomputes the whole fixed buffer. That is wasteful for long texts and right for a
demonstration: it works with any function from tokens to logits, adapted or not, linen or nnx, and compiles
once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def generator(
    logits_fn: Callable[[Any, Array], Array], length: int, *, stop: int | None = None
) -> Callable[..., list[int]]:
    """Compiles a generation loop for buffers of `length` tokens.

    **Arguments:**

    - `logits_fn`: from parameters (any pytree) and tokens (1, length) to logits (1, length, vocab). It must
        be causal: what lies behind the last token in the buffer is zeros.
    - `length`: of the prompt and the new tokens together, at most.
    - `stop`: a token after which to stop; it is not returned.

    **Returns:** `generate(params, prompt, new_tokens, *, temperature=0.0, key=None)`, which takes and returns
    token ids, the new ones only. Temperature 0 takes the likeliest token; above 0 a `key` is needed. It
    raises `ValueError` for an empty prompt, one that does not fit, and a missing key.
    """

    @jax.jit
    def fill(params: Any, buffer: Array, start: Array, end: Array, temperature: Array, key: Array):
        def unfinished(carry: tuple[Array, Array]) -> Array:
            buffer, position = carry
            stopped = False if stop is None else (position > start) & (buffer[position - 1] == stop)
            return (position < end) & ~jnp.asarray(stopped)

        def append(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            buffer, position = carry
            logits = logits_fn(params, buffer[None])[0, position - 1].astype(jnp.float32)
            # Gumbel noise turns the maximum into a sample; none of it gives the greedy choice.
            noise = temperature * jax.random.gumbel(jax.random.fold_in(key, position), logits.shape)
            return buffer.at[position].set(jnp.argmax(logits + noise)), position + 1

        return jax.lax.while_loop(unfinished, append, (buffer, start))

    def generate(
        params: Any,
        prompt: Sequence[int],
        new_tokens: int,
        *,
        temperature: float = 0.0,
        key: Array | None = None,
    ) -> list[int]:
        end = len(prompt) + new_tokens
        if not prompt or new_tokens < 0 or end > length:
            raise ValueError(
                f"{len(prompt)} tokens of prompt and {new_tokens} new ones do not fit a buffer of {length}, "
                f"or the prompt is empty. Shorten one of them, or make the generator with a larger `length`."
            )
        if temperature < 0 or (temperature > 0 and key is None):
            raise ValueError(f"temperature={temperature}: it must be 0 (greedy), or positive with a `key`.")
        buffer = jnp.zeros(length, jnp.int32).at[: len(prompt)].set(jnp.asarray(prompt, jnp.int32))
        key = jax.random.key(0) if key is None else key  # not used at temperature 0
        buffer, position = fill(params, buffer, np.int32(len(prompt)), np.int32(end), np.float32(temperature), key)
        new = np.asarray(buffer)[len(prompt) : int(position)].tolist()
        return new[:-1] if new and new[-1] == stop else new

    return generate
