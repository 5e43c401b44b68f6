"""A training step of a Llama of 1.2 billion parameters, adapted, over the frozen floor: `kernels.py --train`.

Width 2048, 16 layers, 32 query and 8 key heads, MLP 8192, vocabulary 128256 (tied), 4 x 2048 tokens, bfloat16; rank 16
on all seven projections, AdamW on the adapter. The floor is the forward pass and the gradient of the embedded tokens:
what a frozen base costs whatever is trained below it. Layers unrolled, and in a scan.

Attention is cuDNN's where this jax can call it, else XLA's; the line says which.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from benchmarks.timing import Job, measure, summary
from lora_examples.llama import LlamaConfig, rotate
from lora_examples.llama_linen import MLP
from lora_jax import ops

BATCH, LENGTH = 4, 2048
CONFIG = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, rope_theta=500000.0,
)  # fmt: skip
ADAPTER = lj.LoRAConfig(
    rank=16,
    alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
IMPLEMENTATIONS = ("xla", None)


class Attention(nn.Module):
    config: LlamaConfig
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config

        def project(heads: int, name: str) -> jax.Array:
            y = nn.Dense(heads * config.head_dim, use_bias=False, name=name)(x)
            return y.reshape(*y.shape[:2], heads, config.head_dim)

        query = project(config.num_attention_heads, "q_proj")
        key = project(config.num_key_value_heads, "k_proj")
        value = project(config.num_key_value_heads, "v_proj")
        y = jax.nn.dot_product_attention(
            rotate(query, config), rotate(key, config), value, is_causal=True, implementation=self.attention
        )
        return nn.Dense(config.hidden_size, use_bias=False, name="o_proj")(y.reshape(x.shape))


class Layer(nn.Module):
    config: LlamaConfig
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x += Attention(self.config, self.attention, name="self_attn")(nn.RMSNorm(name="input_layernorm")(x))
        return x + MLP(self.config, name="mlp")(nn.RMSNorm(name="post_attention_layernorm")(x)), None


class Trunk(nn.Module):
    """From embedded tokens to logits; the embedding is the head as well."""

    config: LlamaConfig
    attention: str
    scanned: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        if self.scanned:
            layers = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.num_hidden_layers
            )
            x, _ = layers(config, self.attention, name="layers")(x, None)
        else:
            for index in range(config.num_hidden_layers):
                x, _ = Layer(config, self.attention, name=f"layers_{index}")(x)
        embed = nn.Embed(config.vocab_size, config.hidden_size, name="embed_tokens")
        return embed.attend(nn.RMSNorm(name="norm")(x))


def attention_here() -> str:
    """`"cudnn"` if a small attention with grouped heads and its gradient compile, else `"xla"`."""

    def attend(q: jax.Array, k: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, k, is_causal=True, implementation="cudnn").sum()

    shapes = [jax.ShapeDtypeStruct((1, 128, heads, 64), jnp.bfloat16) for heads in (8, 2)]
    try:
        jax.jit(jax.grad(attend)).lower(*shapes).compile()
    except (RuntimeError, ValueError, NotImplementedError):
        return "xla"
    return "cudnn"


def random_params(shapes: Any) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    # Norms' scales are vectors of a layer; those near zero would only make the numbers odd, not the time.
    drawn = [
        (0.02 * jax.random.normal(key, leaf.shape)).astype(jnp.bfloat16) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def steps(
    config: LlamaConfig, batch: int, length: int, attention: str, scanned: bool
) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], int]]:
    """`(row, step, arguments, how many of the results are the next arguments)`."""
    trunk = Trunk(config, attention, scanned)
    embedded = jax.ShapeDtypeStruct((batch, length, config.hidden_size), jnp.bfloat16)
    # Flax makes float32 parameters, beside which a scan must carry float32, which cuDNN's attention does not take.
    initial = Trunk(config, "xla", scanned)
    shapes = jax.eval_shape(initial.init, jax.random.key(0), jax.ShapeDtypeStruct(embedded.shape, jnp.float32))
    params = random_params(shapes["params"])
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)

    def loss_of(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
        logits: Any = trunk.apply({"params": params}, x)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])
        return each.mean()

    def embed(params: Any, tokens: jax.Array) -> jax.Array:
        return params["embed_tokens"]["embedding"][tokens]

    def floor(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(loss_of, argnums=1)(params, embed(params, tokens), tokens)

    yield "frozen floor", floor, (params, tokens), 0

    plan = lj.plan(loss_of, params, embedded, tokens, config=ADAPTER)
    adapter = plan.init(jax.random.key(2))
    optimizer = optax.adamw(1e-4)
    for implementation in IMPLEMENTATIONS:
        adapted = lj.apply(loss_of, plan, implementation=implementation)

        def step(adapter: Any, state: Any, params: Any, tokens: Any, adapted: Any = adapted) -> Any:
            loss, gradient = jax.value_and_grad(adapted, argnums=1)(params, adapter, embed(params, tokens), tokens)
            updates, state = optimizer.update(gradient, state, adapter)
            return optax.apply_updates(adapter, updates), state, loss

        name = "XLA LoRA" if implementation == "xla" else f"LoRA, implementation={implementation}"
        yield name, step, (adapter, optimizer.init(adapter), params, tokens), 2


def lowered(row: str, step: Callable[..., Any], arguments: tuple[Any, ...], carried: int) -> tuple[Any, ...]:
    """The program, and how many adapted products it runs on which implementation (of a scan's, one counts)."""
    with ops.recording() as choices:
        program = jax.jit(step).lower(*arguments)
    return row, program, arguments, carried, dict(Counter(choice.implementation for choice in choices))


def compiled(
    row: str, program: Any, arguments: tuple[Any, ...], carried: int, chosen: dict[str, int]
) -> tuple[Job, int, dict[str, int]]:
    """The job, the bytes that XLA plans for (arguments, results and everything between), and the choices."""
    executable = program.compile()
    analysis = executable.memory_analysis()
    planned = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    now = list(arguments)

    def run() -> Any:
        out = executable(*now)
        now[:carried] = out[:carried]
        return out

    return Job(row, run), planned, chosen


def run(
    rounds: int, *, config: LlamaConfig = CONFIG, batch: int = BATCH, length: int = LENGTH, burst: float = 0.5
) -> Iterator[dict[str, Any]]:
    attention = attention_here()
    for scanned in (False, True):
        start = time.perf_counter()
        with ThreadPoolExecutor(3) as threads:
            programs = [lowered(*each) for each in steps(config, batch, length, attention, scanned)]
            found = list(threads.map(lambda each: compiled(*each), programs))
        seconds = time.perf_counter() - start
        peaks: dict[str, int | None] = {}
        # Least memory first: the peak that the device counts only ever rises.
        for job, *_ in sorted(found, key=lambda each: each[1]):
            before = peak_bytes()
            jax.block_until_ready(job.run())
            peaks[job.row] = peak_bytes() if peak_bytes() > before else None
        (reference, *_), *candidates = found
        measure(reference, [job for job, *_ in candidates], rounds=rounds, burst=burst)
        for job, planned, chosen in found:
            row = summary(job)
            yield {
                "pass": "training step, scanned" if scanned else "training step, unrolled",
                "attention": attention,
                "products": chosen,
                **row,
                "tokens_per_s": round(batch * length / row["median_us"] * 1e6),
                "planned_bytes": planned,
                "peak_bytes": peaks[job.row],
                "compile_s": round(seconds, 1),
            }
        del found, programs, reference, candidates, job  # and with them the parameters


def peak_bytes() -> int:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def gigabytes(count: int | None) -> str:
    return "below an earlier row's" if count is None else f"{count / 1e9:.2f} GB"


def table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{row['pass']:24} {row['row']:28} {row['median_us'] / 1000:8.2f} ms {row['ratio']:6.3f} "
        f"{row['tokens_per_s']:8} tokens/s {row['planned_bytes'] / 1e9:6.2f} GB planned, "
        f"peak {gigabytes(row['peak_bytes'])}, attention by {row['attention']}, {row['products']}"
        for row in rows
    )
