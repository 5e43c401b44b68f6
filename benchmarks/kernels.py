"""The Hopper kernels against XLA on one GPU: checked first, then timed.

    PYTHONPATH=. python3 benchmarks/kernels.py --out benchmarks/results/kernels.jsonl
    PYTHONPATH=. python3 benchmarks/kernels.py --implementation triton --out benchmarks/results/triton.jsonl
    PYTHONPATH=.:interop:examples python3 benchmarks/kernels.py --train --out benchmarks/results/train_step.jsonl

For each shape: the linear by XLA with a frozen weight (the reference, of which ratios are taken), plain LoRA by XLA
(`lora_dot(implementation="xla")`) and the kernels, forward and forward + backward, with dropout and without; each
kernel alone; and few rows, to see from where on the kernels pay (`--shapes`: other sizes). `forward + backward` is y
and the gradient of x for the frozen linear, and those of A and B as well for LoRA. One JSON line a row, a table at the
end. Within `--budget` seconds: what did not fit is named at the end. `--implementation triton`: those kernels instead
of the Hopper ones, and each with other tiles too. `--train`: a training step of a Llama, see `train_step.py`.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.timing import Chain, compile_all, measure, summary, written
from lora_jax import reference
from lora_jax.kernels import mosaic_lora, tuned
from lora_jax.kernels.gemm_config import in_ring, padded_rank
from lora_jax.kernels.mosaic_adapted import adapted
from lora_jax.kernels.mosaic_down import down
from lora_jax.kernels.mosaic_gemm import gemm
from lora_jax.kernels.mosaic_outer import outer
from lora_jax.ops import families, lora_dot
from lora_jax.ops.families import FAMILIES
from tests.kernels.problems import Problem, drawn, seed_words

BF16, F32 = jnp.bfloat16, jnp.float32
family: Any = mosaic_lora  # the kernels that are timed
RATE, THRESHOLD, SMS = 0.05, 3277, 132
SHAPES = [
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 64),
    (16384, 8192, 8192, 64),
    (2048, 2048, 8192, 16),
]
FEW_ROWS = [(m, k, n, 16) for k, n in ((4096, 4096), (2048, 8192)) for m in (256, 512, 1024)]
CHECKED = [(2048, 1024, 2048, 16), (1000, 2112, 1088, 64), (520, 1000, 1032, 5), (512, 1024, 1024, 256)]


@dataclass(frozen=True)
class Group:
    """Rows that share a reference, the first of `chains`; `work` is (flops, bytes) by row."""

    passes: str
    chains: list[Chain]
    work: dict[str, tuple[float, float]]


# What is timed ------------------------------------------------------------------------------------------------------


def frozen(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, preferred_element_type=BF16)


def through(dy: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(dy, w, (((1,), (1,)), ((), ())), preferred_element_type=BF16)


def frozen_both(x: jax.Array, dy: jax.Array, w: jax.Array) -> Any:
    return frozen(x, w), through(dy, w)


def xla(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, key: jax.Array | None = None) -> jax.Array:
    rate = 0.0 if key is None else RATE
    return lora_dot(x, w, a, b, dropout_rate=rate, key=key, implementation="xla")


def xla_both(x: jax.Array, dy: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, key: Any = None) -> Any:
    y, back = jax.vjp(lambda x, a, b: xla(x, w, a, b, key), x, a, b)
    return y, *back(dy)


def drop(seed: jax.Array | None) -> mosaic_lora.Drop | None:
    return None if seed is None else mosaic_lora.Drop(seed, THRESHOLD)


def kernels(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, seed: jax.Array | None = None) -> jax.Array:
    return family.forward(x, w, a, b, drop(seed))[0]


def kernels_both(x: jax.Array, dy: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, seed: Any = None) -> Any:
    y, h = family.forward(x, w, a, b, drop(seed))
    return y, *family.backward(dy, x, w, a, b, h, drop(seed))


def groups(m: int, k: int, n: int, r: int, *, alone: bool) -> Iterator[Group]:
    """What to time of a shape; `alone`: each kernel as well."""
    links = 16 if m * max(k, n) <= 1 << 24 else 4
    keys = jax.random.split(jax.random.key(m + k + n + r), 3 + 2 * links)
    w, a = normal(keys[0], (k, n), k**-0.5), normal(keys[1], (k, r), k**-0.5)
    b = normal(keys[2], (r, n), r**-0.5)
    xs = [normal(key, (m, k), 1.0) for key in keys[3 : 3 + links]]
    dys = [normal(key, (m, n), 1.0) for key in keys[3 + links :]]
    seed, key = jnp.asarray(seed_words()), jax.random.key(1)
    flops = 2.0 * m * k * n
    x_only, dy_only, both = [(x,) for x in xs], [(dy,) for dy in dys], list(zip(xs, dys, strict=True))
    yield Group(
        "forward",
        [
            Chain("XLA frozen", frozen, x_only, (w,)),
            Chain("XLA LoRA", xla, x_only, (w, a, b)),
            Chain("kernels", kernels, x_only, (w, a, b)),
        ],
        dict.fromkeys(("XLA frozen", "XLA LoRA", "kernels"), (flops, 0)),
    )
    rows = ("XLA frozen", "XLA LoRA", "kernels", "XLA LoRA, dropout", "kernels, dropout")
    yield Group(
        "forward + backward",
        [
            Chain("XLA frozen", frozen_both, both, (w,)),
            Chain("XLA LoRA", xla_both, both, (w, a, b)),
            Chain("kernels", kernels_both, both, (w, a, b)),
            Chain("XLA LoRA, dropout", xla_both, both, (w, a, b, key)),
            Chain("kernels, dropout", kernels_both, both, (w, a, b, seed)),
        ],
        dict.fromkeys(rows, (2 * flops, 0)),
    )
    if not alone:
        return
    if family is not mosaic_lora:
        from benchmarks import triton_from_jax

        found, work = triton_from_jax.chains(xs, dys, w, a, b, seed, THRESHOLD)
        bare = Chain("XLA frozen", frozen, x_only, (w,))
        back = Chain("XLA frozen, input gradient", through, dy_only, (w,))
        yield Group("alone", [bare, back, *found], work | dict.fromkeys((bare.row, back.row), (flops, 0)))
        return
    rank = padded_rank(r)
    a_t, b = pad(a.T, rank), pad(b, rank)
    thin = functools.partial(thin_of, ring=in_ring(rank))
    h, g = jax.jit(thin)(xs[0], a_t.T), jax.jit(thin)(dys[0], b.T)
    masked = {"threshold": THRESHOLD}

    def product(x, w, thin, tail, seed=None, *, transposed=False):
        out = w.shape[0] if transposed else w.shape[1]
        config = tuned.gemm_config(m, x.shape[1], out, rank, dropped=seed is not None, transposed=transposed)
        options = {} if seed is None else {"seed": seed, **masked}
        return gemm(x, w, thin, tail, config, transposed=transposed, **options)

    def thin_product(x, a, seed=None):
        options = {} if seed is None else {"seed": seed, **masked}
        return down(x, a, tuned.down_config(m, x.shape[1], rank, SMS, dropped=seed is not None), **options)

    def outer_product(x, dy, g, h, seed=None):
        options = {} if seed is None else {"seed": seed, **masked}
        return outer([(x, g), (dy, h)], tuned.outer_config(m, k + n, rank, SMS, dropped=seed is not None), **options)

    def in_one(x, w, a_t, b, seed=None, *, transposed=False):
        options = {} if seed is None else {"seed": seed, **masked}
        return adapted(x, w, a_t, b, transposed=transposed, **options)

    in_one_back = functools.partial(in_one, transposed=True)

    back = functools.partial(product, transposed=True)
    tail = a_t.T if in_ring(rank) else a_t
    chains = [
        Chain("XLA frozen", frozen, x_only, (w,)),
        Chain("XLA frozen, input gradient", through, dy_only, (w,)),
        Chain("gemm", product, x_only, (w, h, b)),
        Chain("gemm, input gradient", back, dy_only, (w, g, tail)),
        Chain("gemm, input gradient, dropout", back, dy_only, (w, g, tail, seed)),
        Chain("down x", thin_product, x_only, (a_t,)),
        Chain("down x, dropout", thin_product, x_only, (a_t, seed)),
        Chain("down dy", thin_product, dy_only, (b,)),
        Chain("outer x and dy", outer_product, both, (g, h)),
        Chain("outer x and dy, dropout", outer_product, both, (g, h, seed)),
    ]
    if mosaic_lora.in_one_kernel(min(k, n), rank):
        chains += [
            Chain("gemm with down x", in_one, x_only, (w, a_t, b)),
            Chain("gemm with down dy, input gradient", in_one_back, dy_only, (w, b, a_t)),
            Chain("gemm with down dy, input gradient, dropout", in_one_back, dy_only, (w, b, a_t, seed)),
        ]
    work = {}
    for chain in chains:
        width = k + n if "outer" in chain.row else n if "dy" in chain.row else k
        big = chain.row.startswith(("gemm", "XLA"))
        # The thin passes read their matrix once; the rest is small beside it.
        work[chain.row] = (flops, 0) if big else (2.0 * m * width * rank, 2.0 * m * width)
    yield Group("alone", chains, work)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], spread: float) -> jax.Array:
    return (spread * jax.random.normal(key, shape, F32)).astype(BF16)


def pad(rank_major: jax.Array, rank: int) -> jax.Array:
    return jnp.pad(rank_major, ((0, rank - rank_major.shape[0]), (0, 0)))


def thin_of(x: jax.Array, factor: jax.Array, *, ring: bool) -> jax.Array:
    h = jnp.dot(x, factor, preferred_element_type=F32).astype(BF16)
    return h if ring else h.T


# Right before fast --------------------------------------------------------------------------------------------------


def check_small() -> None:
    """Values and gradients against float64 at sizes where all of it can be computed; raises."""
    for m, k, n, r in CHECKED:
        for threshold in (0, THRESHOLD * 4):
            problem = Problem(m, k, n, r, threshold=threshold)
            x, w, a, b, dy = (jnp.asarray(v) for v in problem.operands())
            options = mosaic_lora.Drop(jnp.asarray(seed_words()), threshold) if threshold else None

            @jax.jit
            def both(x, dy, w, a, b, options=options):
                y, h = family.forward(x, w, a, b, options)
                return y, *family.backward(dy, x, w, a, b, h, options)

            problem.check(dict(zip("yxab", both(x, dy, w, a, b), strict=True)))


def check_timed(m: int, k: int, n: int, r: int, rows: int = 32) -> None:
    """The last rows of `y` and of the gradient of `x`, with and without dropout; raises."""
    keys = jax.random.split(jax.random.key(0), 5)
    spreads = {(m, k): 1.0, (m, n): 1.0, (k, n): k**-0.5, (k, r): k**-0.5, (r, n): 1.0}
    shapes = [(m, k), (m, n), (k, n), (k, r), (r, n)]
    operands = [normal(key, shape, spreads[shape]) for key, shape in zip(keys, shapes, strict=True)]
    x, dy, w, a, b = (np.asarray(v) for v in (operands[0][-rows:], operands[1][-rows:], *operands[2:]))
    keep = drawn((rows, k), origin=(m - rows, 0)) >= THRESHOLD
    x64, dy64, w64 = (v.astype(np.float64) for v in (x, dy, w))
    without = {"y": x64 @ w64, "x": dy64 @ w64.T}
    for seed, mask in ((None, None), (jnp.asarray(seed_words()), keep * (65536 / (65536 - THRESHOLD)))):
        y, dx, *_ = jax.jit(kernels_both)(*operands, seed)
        answers = reference.fused(x, w, a, b, dy, BF16, 1.0, mask)
        for name, got in (("y", y[-rows:]), ("x", dx[-rows:])):
            excess, bare = (reference.excess(v, *answers[name]) for v in (got, without[name]))
            if excess > 1 or bare <= 1:
                raise AssertionError(
                    f"{name} of {m, k, n, r}: {excess:.2f} times the bound, without adapter {bare:.2f}"
                )


# The run ------------------------------------------------------------------------------------------------------------


def about() -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "gpu": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flax": version("flax"),
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": git.stdout.strip() or "unknown",
    }


def time_shape(shape: tuple[int, int, int, int], *, alone: bool, rounds: int) -> Iterator[dict[str, Any]]:
    found = list(groups(*shape, alone=alone))
    jobs = iter(compile_all([chain for group in found for chain in group.chains]))
    m, k, n, r = shape
    for group in found:
        reference_job, *candidates = [next(jobs) for _ in group.chains]
        measure(reference_job, candidates, rounds=rounds, burst=0.06 if group.passes != "alone" else 0.03)
        for job in (reference_job, *candidates):
            row: dict[str, Any] = {"m": m, "k": k, "n": n, "r": r, "pass": group.passes, **summary(job)}
            flops, moved = group.work[job.row]
            row["tflops"] = round(flops / row["median_us"] / 1e6, 1)
            if moved:
                row["tb_per_s"] = round(moved / row["median_us"] / 1e6, 2)
            yield row


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        shape = "{m}x{k}x{n} r={r}".format(**row)
        speed = f"{row['tflops']:6.0f} TF/s" + (f" {row['tb_per_s']:5.2f} TB/s" if "tb_per_s" in row else "")
        low, high = row["ratio_spread"]
        lines.append(
            f"{shape:24} {row['pass']:18} {row['row']:30} {row['median_us']:9.1f} us {row['ratio']:6.3f} "
            f"({low:.3f} to {high:.3f}) {speed}"
        )
    return "\n".join(lines)


def sizes(text: str) -> list[tuple[int, ...]]:
    """M x K x N x R each."""
    return [tuple(map(int, each.split("x"))) for each in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240, help="seconds; no shape is begun that may not fit")
    parser.add_argument("--quick", action="store_true", help="two shapes, three rounds")
    parser.add_argument("--shapes", type=sizes, help="sizes instead, as 512x4096x4096x16,...")
    parser.add_argument("--implementation", choices=FAMILIES, default="mosaic_gpu")
    parser.add_argument("--train", action="store_true", help="a training step instead")
    parser.add_argument("--commit", help="what to write as the commit where this is no git repository")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file instead of printing them")
    options = parser.parse_args()
    start, rows, longest = time.perf_counter(), [], 0.0
    global family
    family = families.kernels(options.implementation)
    common = about() | {"implementation": options.implementation}
    common |= {"commit": options.commit} if options.commit else {}

    def emit(row: dict[str, Any]) -> None:
        rows.append(row)
        written(common | row, options.out)

    if options.train:
        from benchmarks import train_step

        for row in train_step.run(rounds=2 if options.quick else 4):
            emit(row)
        print(train_step.table(rows))
        return

    check_small()
    print(f"checked {len(CHECKED)} sizes, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    todo = [(shape, True) for shape in ([SHAPES[0], SHAPES[4]] if options.quick else SHAPES)]
    todo += [] if options.quick else [(shape, False) for shape in FEW_ROWS]
    if options.shapes:
        todo = [(shape, shape in SHAPES) for shape in options.shapes]
    left_out = []
    for shape, alone in todo:
        began = time.perf_counter()
        # The longest so far was one with each kernel alone; few rows take about half of that.
        if began - start + longest * (1 if alone else 0.5) > options.budget:
            left_out.append(shape)
            continue
        check_timed(*shape)
        for row in time_shape(shape, alone=alone, rounds=3 if options.quick else 5):
            emit(row)
        longest = max(longest, time.perf_counter() - began)
        print(f"{shape}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    if left_out:
        sys.exit(f"not measured, for want of time (--budget {options.budget:.0f}): {left_out}")


if __name__ == "__main__":
    main()
