"""What adapting costs before the first step: trace, lower and compile time of a 16-layer model, against the plain one.

    python benchmarks/trace_overhead.py [--layers 16] [--width 256] [--repeats 7]

Prints one JSON line per case: median seconds of each stage for the plain function, the adapted one, and the same
model with its low-rank products written by hand; and the median ratios of their sums to the plain one's, by the clock
on the wall and by CPU seconds. The ratio by hand is the floor: XLA compiles three products where there was one,
whoever writes them. Runs alternate, so that a slow spell falls on all. The target is a ratio of at most 1.25.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp

import lora_jax as lj

STAGES = ("trace", "lower", "compile")
SIDES = ("plain", "adapted", "by_hand")
CONFIG = lj.LoRAConfig(target_modules=[f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")])


class Dense(nn.Module):
    """A linear layer with a low-rank branch, as one would write it without a library."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        a, b = (self.get_variable("lora", name)["kernel"] for name in ("lora_A", "lora_B"))
        scale = CONFIG.alpha / CONFIG.rank
        return jnp.dot(x, kernel) + jnp.dot(jnp.dot(x, a), scale * b)


class Block(nn.Module):
    """A transformer layer of seven adapted products, as in Llama."""

    heads: int
    dense: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        h = nn.RMSNorm(name="attention_norm")(x)
        shape = (*h.shape[:-1], self.heads, width // self.heads)
        q, k, v = (self.dense(width, use_bias=False, name=f"{n}_proj")(h).reshape(shape) for n in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape)
        x = x + self.dense(width, use_bias=False, name="o_proj")(y)
        h = nn.RMSNorm(name="mlp_norm")(x)
        gate, up = (self.dense(2 * width, use_bias=False, name=f"{n}_proj")(h) for n in ("gate", "up"))
        return x + self.dense(width, use_bias=False, name="down_proj")(nn.silu(gate) * up), None


class Model(nn.Module):
    """Embedding, layers (unrolled or scanned) and a tied head."""

    layers: int
    width: int
    scanned: bool
    dense: Any = nn.Dense
    vocabulary: int = 512

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        x = embed(ids)
        if self.scanned:
            stack = nn.scan(
                Block, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True}, length=self.layers
            )
            x, _ = stack(4, self.dense, name="layers")(x, None)
        else:
            for i in range(self.layers):
                x, _ = Block(4, self.dense, name=f"layers_{i}")(x)
        return embed.attend(nn.RMSNorm(name="norm")(x))


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def cases(layers: int, width: int) -> dict[str, tuple[Call, Call, Call]]:
    """By name: a function and its arguments for each of `SIDES`."""
    found = {}
    ids = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    for scanned in (False, True):
        model = Model(layers, width, scanned)
        params = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), jnp.zeros((2, 32), jnp.int32)))[
            "params"
        ]

        def fn(params: Any, ids: jax.Array, model: Model = model) -> jax.Array:
            return jnp.mean(model.apply({"params": params}, ids))  # type: ignore[arg-type]

        def by_hand(params: Any, adapter: Any, ids: jax.Array, model: Model = model) -> jax.Array:
            variables = {"params": params, "lora": adapter.to_dict()}
            return jnp.mean(model.clone(dense=Dense).apply(variables, ids))  # type: ignore[arg-type]

        plan = lj.plan(fn, params, ids, config=CONFIG)
        adapter = jax.eval_shape(plan.init, jax.random.key(0))
        plain, low_rank = (params, ids), (params, adapter, ids)
        adapted = lj.apply(fn, plan)
        name = "scanned" if scanned else "unrolled"
        found[f"{name}, forward"] = (fn, plain), (adapted, low_rank), (by_hand, low_rank)
        # Against training all of the plain model: what a user would otherwise compile.
        found[f"{name}, value_and_grad"] = (
            (jax.value_and_grad(fn), plain),
            (jax.value_and_grad(adapted, argnums=1), low_rank),
            (jax.value_and_grad(by_hand, argnums=1), low_rank),
        )
    return found


def stages(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of trace, lower and compile, nothing cached."""
    jax.clear_caches()
    times = []
    # A function of its own each time: jit remembers functions it has traced.
    step: Any = jax.jit(lambda *a: fn(*a))
    before = time.perf_counter(), time.process_time()
    for stage in STAGES:
        step = step.trace(*args) if stage == "trace" else getattr(step, stage)()
        now = time.perf_counter(), time.process_time()
        times.append((now[0] - before[0], now[1] - before[1]))
        before = now
    return times


def ratio(runs: list[Any], side: int, clock: int) -> float:
    """Median over the runs of one side / plain, all stages together."""
    return round(statistics.median(sum(t[clock] for t in r[side]) / sum(t[clock] for t in r[0]) for r in runs), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    about = {"jax": jax.__version__, "lora_jax": lj.__version__, "python": platform.python_version()}
    about |= {"layers": options.layers, "width": options.width, "repeats": options.repeats, "cpus": os.cpu_count()}
    for name, calls in cases(options.layers, options.width).items():
        if options.only not in name:
            continue
        # The first round is warm-up.
        runs = [[stages(*call) for call in calls] for _ in range(options.repeats + 1)][1:]
        line: dict[str, Any] = {"case": name}
        for side, label in list(enumerate(SIDES))[1:]:
            line |= {f"{label}_ratio": ratio(runs, side, 0), f"{label}_cpu_ratio": ratio(runs, side, 1)}
        for side, label in enumerate(SIDES):
            for i, stage in enumerate(STAGES):
                for clock, unit in enumerate(("wall", "cpu")):
                    median = statistics.median(run[side][i][clock] for run in runs)
                    line[f"{label}_{stage}_{unit}_s"] = round(median, 3)
        print(json.dumps(line | about), flush=True)


if __name__ == "__main__":
    main()
