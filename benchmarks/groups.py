"""Projections that share `x`, a bias, and the gated MLP on one GPU: checked first, then timed.

    PYTHONPATH=. python3 benchmarks/groups.py --out benchmarks/results/groups.jsonl

For each group (query, key and value; gate and up): the frozen products by XLA (the reference, of which ratios are
taken), the adapted ones by XLA and by the kernels, in turn (`lora_dot` for each) and together (`lora_dot_group`);
forward, and with all gradients, with dropout and without. For a bias: the product without it, with it in the epilogue,
and with an addition after it. For the gated MLP: `lora_swiglu` and the same written out, with the bytes that a gradient
through a scan over four of them needs beside its operands. A JSON line a row, a table at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.kernels import RATE, THRESHOLD, about, normal
from benchmarks.timing import Chain, compile_all, measure, summary, written
from lora_jax.kernels import mosaic_group, mosaic_lora
from lora_jax.ops import LoraKernel, lora_dot, lora_dot_group, lora_swiglu
from tests.kernels.problems import GroupProblem, Problem, seed_words

# M, K, each N, rank: an 8 B Llama's attention and MLP, a 1 B Llama's.
GROUPS = [
    (8192, 4096, (4096, 1024, 1024), 16),
    (8192, 4096, (14336, 14336), 16),
    (8192, 2048, (2048, 512, 512), 16),
    (8192, 2048, (8192, 8192), 16),
    (8192, 4096, (4096, 1024, 1024), 64),
]
BIASED = [(8192, 4096, 4096, 16), (8192, 768, 3072, 16)]
MLP = [(8192, 2048, 8192, 16)]
CHECKED = [
    GroupProblem(1000, 1000, (1032, 320, 448), (5, 9, 16), threshold=4 * THRESHOLD),
    GroupProblem(2048, 1024, (2048, 512), (20, 64)),
]
KERNELS = "mosaic_gpu"


def check() -> None:
    """Values and gradients against float64; raises."""
    for problem in CHECKED:
        x, ws, a_s, b_s, biases, dys = jax.tree.map(jnp.asarray, problem.operands())
        drop = mosaic_lora.Drop(jnp.asarray(seed_words()), problem.threshold) if problem.threshold else None

        @jax.jit
        def both(x, ws, a_s, b_s, dys, drop=drop, biases=biases):
            ys, h = mosaic_group.forward(x, ws, a_s, b_s, drop, biases=biases)
            dx, das, dbs = mosaic_group.backward(dys, x, ws, a_s, b_s, h, drop)
            return dx, ys, das, dbs

        problem.check(*both(x, ws, a_s, b_s, dys))
    problem = Problem(1000, 1024, 1032, 5, bias_dtype=jnp.float32)
    x, w, a, b, _ = map(jnp.asarray, problem.operands())
    problem.check({"y": jax.jit(mosaic_lora.forward)(x, w, a, b, bias=jnp.asarray(problem.bias()))[0]})


def operands(m: int, k: int, ns: tuple[int, ...], r: int) -> tuple[Any, ...]:
    """Several `x` and `dys`, and of each product the weight and the factors."""
    keys = iter(jax.random.split(jax.random.key(m + k + sum(ns)), 99))
    links = 4
    xs = [normal(next(keys), (m, k), 1.0) for _ in range(links)]
    dys = [tuple(normal(next(keys), (m, n), 1.0) for n in ns) for _ in range(links)]
    ws = [normal(next(keys), (k, n), k**-0.5) for n in ns]
    a_s = [normal(next(keys), (k, r), k**-0.5) for _ in ns]
    return xs, dys, ws, a_s, [normal(next(keys), (r, n), r**-0.5) for n in ns]


def frozen(x: jax.Array, ws: Any) -> Any:
    return tuple(jnp.dot(x, w, preferred_element_type=x.dtype) for w in ws)


def frozen_both(x: jax.Array, dys: Any, ws: Any) -> Any:
    ys, back = jax.vjp(lambda x: frozen(x, ws), x)
    return ys, back(dys)


def together(implementation: str, x: jax.Array, ws: Any, a_s: Any, b_s: Any, key: Any = None) -> Any:
    options = {"dropout_rate": 0.0 if key is None else RATE, "key": key, "implementation": implementation}
    return lora_dot_group(x, ws, a_s, b_s, **options)


def in_turn(implementation: str, x: jax.Array, ws: Any, a_s: Any, b_s: Any, key: Any = None) -> Any:
    options = {"dropout_rate": 0.0 if key is None else RATE, "key": key, "implementation": implementation}
    return tuple(lora_dot(x, w, a, b, **options) for w, a, b in zip(ws, a_s, b_s, strict=True))


def both(fn: Any) -> Any:
    def run(x: jax.Array, dys: Any, ws: Any, a_s: Any, b_s: Any, key: Any = None) -> Any:
        ys, back = jax.vjp(lambda x, a_s, b_s: fn(x, ws, a_s, b_s, key), x, a_s, b_s)
        return ys, back(dys)

    return run


def of_groups(m: int, k: int, ns: tuple[int, ...], r: int) -> Iterator[tuple[str, list[Chain]]]:
    xs, dys, ws, a_s, b_s = operands(m, k, ns, r)
    ways = {
        "XLA, together": lambda *v: together("xla", *v),
        "XLA, in turn": lambda *v: in_turn("xla", *v),
        "kernels, together": lambda *v: together(KERNELS, *v),
        "kernels, in turn": lambda *v: in_turn(KERNELS, *v),
    }
    alone, pairs, rest = [(x,) for x in xs], list(zip(xs, dys, strict=True)), (ws, a_s, b_s)
    yield (
        "forward",
        [Chain("XLA frozen", frozen, alone, (ws,)), *(Chain(name, fn, alone, rest) for name, fn in ways.items())],
    )
    for passes, key in (("forward + backward", ()), ("forward + backward, dropout", (jax.random.key(1),))):
        chains = [Chain(name, both(fn), pairs, (*rest, *key)) for name, fn in ways.items()]
        yield passes, [Chain("XLA frozen", frozen_both, pairs, (ws,)), *chains]


def of_bias(m: int, k: int, n: int, r: int) -> Iterator[tuple[str, list[Chain]]]:
    xs, _, (w,), (a,), (b,) = operands(m, k, (n,), r)
    bias, alone = normal(jax.random.key(3), (n,), 1.0), [(x,) for x in xs]

    def kernels(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, bias: Any = None) -> jax.Array:
        return lora_dot(x, w, a, b, bias=bias, implementation=KERNELS)

    def added_after(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, bias: jax.Array) -> jax.Array:
        return kernels(x, w, a, b) + bias

    def frozen_bias(x: jax.Array, w: jax.Array, bias: jax.Array) -> jax.Array:
        return frozen(x, [w])[0] + bias

    yield (
        "forward, bias",
        [
            Chain("XLA frozen, with bias", frozen_bias, alone, (w, bias)),
            Chain("kernels, no bias", kernels, alone, (w, a, b)),
            Chain("kernels, bias in the epilogue", kernels, alone, (w, a, b, bias)),
            Chain("kernels, bias added after", added_after, alone, (w, a, b, bias)),
        ],
    )


@dataclass(frozen=True)
class MlpChain(Chain):
    """With the layer itself, without its gradient."""

    layer: Any = None


def of_mlp(m: int, k: int, n: int, r: int) -> Iterator[tuple[str, list[Chain]]]:
    xs, _, ws, a_s, b_s = operands(m, k, (n, n), r)
    _, _, (w,), (a,), (b,) = operands(8, n, (k,), r)
    kernels = [*ws, w]
    dys = [normal(jax.random.key(i), (m, k), 1.0) for i in range(len(xs))]
    factors = [*zip(a_s, b_s, strict=True), (a, b)]

    def written_out(x: jax.Array, *layers: LoraKernel) -> jax.Array:
        opened, raised, down = (lambda x, v=v: lora_dot(x, v.kernel, v.a, v.b, implementation=KERNELS) for v in layers)
        return down(jax.nn.silu(opened(x)) * raised(x))

    def step(fn: Any) -> Any:
        def run(x: jax.Array, dy: jax.Array, kernels: Any, factors: Any) -> Any:
            def of(x: jax.Array, factors: Any) -> jax.Array:
                return fn(x, *(LoraKernel(w, a, b) for w, (a, b) in zip(kernels, factors, strict=True)))

            y, back = jax.vjp(of, x, factors)
            return y, back(dy)

        return run

    ways = {
        "written out": written_out,
        "lora_swiglu": lambda *v: lora_swiglu(*v, implementation=KERNELS),
    }
    pairs, rest = list(zip(xs, dys, strict=True)), (kernels, factors)
    yield "gated MLP, forward + backward", [MlpChain(name, step(fn), pairs, rest, fn) for name, fn in ways.items()]


def temporaries(chain: Chain, layers: int = 4) -> int:
    """Bytes that a gradient through a scan over as many such layers needs beside its operands and results."""
    (x, dy), (kernels, factors) = chain.inputs[0], chain.rest

    def gradient(x: jax.Array, dy: jax.Array, kernels: Any, stacks: Any) -> Any:
        def of(stacks: Any) -> jax.Array:
            def layer(x: jax.Array, factors: Any) -> tuple[jax.Array, None]:
                each = zip(kernels, factors, strict=True)
                return x + chain.layer(x, *(LoraKernel(w, a, b) for w, (a, b) in each)), None

            return lax.scan(layer, x, stacks)[0]

        return jax.vjp(of, stacks)[1](dy)

    stacks = jax.tree.map(lambda v: jnp.broadcast_to(v, (layers, *v.shape)), factors)
    compiled = jax.jit(gradient).lower(x, dy, kernels, stacks).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240, help="seconds after which no shape is begun")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", help="what to write as the commit where this is no git repository")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file instead of printing them")
    options = parser.parse_args()
    start, common = time.perf_counter(), about() | ({"commit": options.commit} if options.commit else {})
    check()
    print(f"checked, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    todo = [(of_groups, *GROUPS[0]), *((of_bias, *shape) for shape in BIASED), *((of_mlp, *shape) for shape in MLP)]
    todo += [(of_groups, *shape) for shape in GROUPS[1:]]
    lines, left_out = [], []
    for kind, m, k, n, r in todo:
        if time.perf_counter() - start > options.budget:
            left_out.append((kind.__name__, m, k, n, r))
            continue
        for passes, chains in kind(m, k, n, r):
            reference, *candidates = compile_all(chains)
            measure(reference, candidates, rounds=options.rounds, burst=0.03)
            for job, chain in zip((reference, *candidates), chains, strict=True):
                row = {"m": m, "k": k, "n": n, "r": r, "pass": passes, **summary(job)}
                if isinstance(chain, MlpChain):
                    row["temporary_bytes"] = temporaries(chain)
                written(common | row, options.out)
                low, high = row["ratio_spread"]
                held = f" {row['temporary_bytes'] / 1e6:8.0f} MB" if "temporary_bytes" in row else ""
                lines.append(
                    f"{m} x {k} x {n} r={r:3} {passes:30} {row['row']:30} {row['median_us']:9.1f} us "
                    f"{row['ratio']:6.3f} ({low:.3f} to {high:.3f}){held}"
                )
        print(f"{kind.__name__} {m, k, n, r}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(lines))
    if left_out:
        sys.exit(f"not measured, for want of time (--budget {options.budget:.0f}): {left_out}")


if __name__ == "__main__":
    main()
