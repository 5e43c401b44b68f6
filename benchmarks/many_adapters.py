"""A batch over 32 adapters against the same batch with a single one, on one GPU: checked first, then timed.

    PYTHONPATH=. python3 benchmarks/many_adapters.py --out benchmarks/results/many_adapters.jsonl

Each case is one linear layer through `lora_jax.apply` (the reference, of which ratios are taken) and through
`lora_jax.apply_many`, every row of the batch with an adapter of its own out of 32 slots: by the way that is chosen
for the shape (`auto`), by each of the two ways, and, for comparison, by sorting the rows and `jax.lax.ragged_dot`.
`single by XLA` is the reference without fused kernels, `frozen` the layer without adapters. "train" is y and the
gradients of x and of all factors (float32, rank 16), "decode" is y of one token a row (factors in bfloat16), of several
layers in turn, as in a model: no weight is left in the cache since it was last read. The goal is a ratio of at most
1.15. `bytes` is what weights and factors alone would make of it, were only they to be read from memory. One JSON line a
row, a table at the end. `--smoke` runs tiny shapes on any device and times nothing useful.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lora_jax as lj
from benchmarks.kernels import about
from benchmarks.timing import Chain, compile_all, measure, summary, written
from lora_jax import reference
from lora_jax.sites import LORA_A, LORA_B

SLOTS, RANK = 32, 16
LAYERS = 8  # when decoding: a weight of 4096x4096 is smaller than the cache of an H100
BF16 = jnp.bfloat16


class Case(NamedTuple):
    """Rows of `tokens` tokens, a (k, n) weight, and whether gradients are taken."""

    pass_: str
    rows: int
    tokens: int
    k: int
    n: int


CASES = [
    Case("train", 32, 256, 4096, 4096),
    Case("train", 32, 256, 4096, 14336),
    Case("train", 32, 128, 2048, 8192),
    Case("decode", 32, 1, 4096, 4096),
    Case("decode", 32, 1, 4096, 14336),
    Case("decode", 128, 1, 4096, 4096),
    Case("decode", 256, 1, 4096, 14336),
]
SMOKE = [Case("train", 8, 16, 64, 48), Case("decode", 8, 1, 64, 48)]


def model(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"]


def factors(adapter: Any, case: Case) -> dict[str, Any]:
    """Random ones in the shape of `adapter`, of an effect like the weight's."""
    dtype = "float32" if case.pass_ == "train" else BF16
    keys = jax.random.split(jax.random.key(case.n), 2)
    return {
        name: {"kernel": (jax.random.normal(key, adapter[name]["kernel"].shape) * size**-0.5).astype(dtype)}
        for name, key, size in ((LORA_A, keys[0], case.k), (LORA_B, keys[1], RANK))
    }


class Setting(NamedTuple):
    params: Any
    plan: lj.Plan
    single: lj.Adapter
    stack: lj.AdapterStack
    ids: jax.Array


def setting(case: Case) -> Setting:
    kernel = (jax.random.normal(jax.random.key(1), (case.k, case.n)) * case.k**-0.5).astype(BF16)
    params = {"kernel": kernel}
    x = jax.ShapeDtypeStruct((case.rows, case.tokens, case.k), BF16)
    plan = lj.plan(model, params, x, config=lj.LoRAConfig(rank=RANK, alpha=RANK, target_modules=".*"))
    adapter = plan.init(jax.random.key(0))
    single = lj.Adapter(factors(adapter, case), plan.sites)
    empty = lj.AdapterBank.create(plan.sites, SLOTS, dtype=jax.tree.leaves(single)[0].dtype).stack
    stack = lj.AdapterStack(factors(empty.factors, case), {s.name: jnp.ones(SLOTS) for s in plan.sites}, plan.sites)
    ids = jax.random.permutation(jax.random.key(2), jnp.arange(case.rows, dtype=jnp.int32) % SLOTS)
    return Setting(params, plan, single, stack, ids)


def by_ragged_dot(params: Any, trained: Any, ids: jax.Array, x: jax.Array) -> jax.Array:
    """Rows sorted by adapter, grouped products, and the rows put back."""
    order = jnp.argsort(ids)
    flat = x[order].reshape(-1, x.shape[-1])
    sizes = jnp.bincount(ids, length=SLOTS) * x.shape[1]
    a, b = (trained[name]["kernel"].astype(x.dtype) for name in (LORA_A, LORA_B))
    h = lax.ragged_dot(flat, a, sizes, preferred_element_type=jnp.float32).astype(x.dtype)
    branch = lax.ragged_dot(h, b, sizes).reshape(*x.shape[:-1], -1)
    return x @ params["kernel"] + branch[jnp.argsort(order)]


def ways(s: Setting) -> dict[str, tuple[Callable[..., Any], Any]]:
    """`{row: (y of (x, trained, params, ids), trained)}`, the reference first."""

    def one(implementation: str | None) -> Callable[..., Any]:
        run = lj.apply(model, s.plan, implementation=implementation)
        return lambda x, trained, params, ids: run(params, trained, x)

    def several(selection: str | None) -> Callable[..., Any]:
        run = lj.apply_many(model, s.plan, selection=selection)
        return lambda x, trained, params, ids: run(params, s.stack.with_factors(trained), ids, x)

    stacked = s.stack.factors
    # Grouped products want an adapter's A in one piece.
    grouped = {LORA_A: {"kernel": jnp.moveaxis(stacked[LORA_A]["kernel"], 1, 0)}, LORA_B: stacked[LORA_B]}
    return {
        "single": (one(None), s.single),
        "single by XLA": (one("xla"), s.single),
        "frozen": (lambda x, trained, params, ids: model(params, x), s.single),
        "many, auto": (several(None), stacked),
        "many, gathered": (several("gathered"), stacked),
        "many, masked": (several("masked"), stacked),
        "many, ragged_dot": (lambda x, trained, params, ids: by_ragged_dot(params, trained, ids, x), grouped),
    }


def both(run: Callable[..., Any], x: Any, dy: Any, trained: Any, params: Any, ids: Any) -> Any:
    y, back = jax.vjp(lambda x, trained: run(x, trained, params, ids), x, trained)
    return y, back(dy)


def chains(case: Case, s: Setting) -> list[Chain]:
    links = 16 if case.tokens == 1 else 4
    keys = jax.random.split(jax.random.key(3), 2 * links)
    xs = [jax.random.normal(key, (case.rows, case.tokens, case.k)).astype(BF16) for key in keys[:links]]
    dys = [jax.random.normal(key, (case.rows, case.tokens, case.n)).astype(BF16) for key in keys[links:]]
    out = []
    for row, (run, trained) in ways(s).items():
        if case.pass_ == "train":
            inputs: Any = list(zip(xs, dys, strict=True))
            out.append(Chain(row, functools.partial(both, run), inputs, (trained, s.params, s.ids)))
        else:
            layers = [jax.tree.map(jnp.copy, (trained, s.params)) for _ in range(LAYERS)]
            out.append(Chain(row, run, [(x, *layers[i % LAYERS]) for i, x in enumerate(xs)], (s.ids,)))
    return out


def check(case: Case, s: Setting, rows: int = 4) -> None:
    """The first rows by every way against float64, each with its own adapter; raises."""
    x = jax.random.normal(jax.random.key(9), (case.rows, case.tokens, case.k)).astype(BF16)
    a, b = (np.asarray(s.stack.factors[name]["kernel"]) for name in (LORA_A, LORA_B))
    w, some = np.asarray(s.params["kernel"]), np.asarray(x[:rows, :8])
    wanted = [reference.lora_dot(some[i], w, a[:, s.ids[i]], b[s.ids[i]], 1.0) for i in range(rows)]
    want, magnitude = (np.stack(part) for part in zip(*wanted, strict=True))
    bound = reference.tolerance(BF16, case.k + RANK) * magnitude
    for row, (run, trained) in ways(s).items():
        got = jax.jit(run)(x, trained, s.params, s.ids)[:rows, :8]
        error = np.abs(np.asarray(got).astype(np.float64) - want).mean() / np.abs(want).mean()
        excess = reference.excess(got, want, bound)
        # The bound on every element is a wide one in bfloat16: the mean error tells a wrong adapter as well.
        if row.startswith("many") and (excess > 1 or error > 0.02):
            raise AssertionError(f"{row} of {case}: {excess:.2f} times the bound, mean error {error:.3f}")
        if row in ("single", "frozen") and error < 0.1:
            raise AssertionError(f"{row} of {case} cannot be told from {SLOTS} adapters: mean error {error:.3f}")


def time_case(case: Case, rounds: int, burst: float) -> Iterator[dict[str, Any]]:
    s = setting(case)
    check(case, s)
    first, *others = compile_all(chains(case, s))
    measure(first, others, rounds=rounds, burst=burst)
    for job in (first, *others):
        yield {**case._asdict(), "slots": SLOTS, "r": RANK, **summary(job), "bytes": _bytes(case)}


def _bytes(case: Case) -> float | None:
    """Those of the weight and of all factors over those with one adapter's, when decoding."""
    factors = (case.k + case.n) * RANK
    whole = case.k * case.n
    return round((whole + SLOTS * factors) / (whole + factors), 3) if case.pass_ == "decode" else None


def table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        "{pass_:7} {rows:4} x {tokens:<4} {k}x{n}".format(**row).ljust(32)
        + "{row:18} {median_us:9.1f} us {ratio:6.3f} ({ratio_spread[0]:.3f} to {ratio_spread[1]:.3f})".format(**row)
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240, help="seconds; no case is begun that may not fit")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--commit", help="what to write as the commit where this is no git repository")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file instead of printing them")
    options = parser.parse_args()
    start, rows, longest, left_out = time.perf_counter(), [], 0.0, []
    common = about() | ({"commit": options.commit} if options.commit else {})
    for case in SMOKE if options.smoke else CASES:
        began = time.perf_counter()
        if began - start + longest > options.budget:
            left_out.append(case)
            continue
        for row in time_case(case, *((1, 0.001) if options.smoke else (5, 0.06))):
            rows.append(row)
            written(common | row, options.out)
        longest = max(longest, time.perf_counter() - began)
        print(f"{case}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    if left_out:
        sys.exit(f"not measured, for want of time (--budget {options.budget:.0f}): {left_out}")


if __name__ == "__main__":
    main()
