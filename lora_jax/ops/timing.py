"""Times of programs on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax


def chained(fn: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], rest: tuple[Any, ...]) -> Callable[[], Any]:
    """Compiles `fn(*inputs[i], *rest)` for each `i` in turn, in one program, since a launch takes its time as well."""
    fn = jax.jit(fn)

    def program(inputs: Sequence[tuple[Any, ...]], rest: tuple[Any, ...]) -> list[Any]:
        outputs = []
        following = inputs[0]
        for i in range(len(inputs)):
            outputs.append(fn(*following, *rest))
            if i + 1 < len(inputs):
                # Without it XLA would run them in any order, or several at once.
                following, outputs[-1] = lax.optimization_barrier((inputs[i + 1], outputs[-1]))
        return outputs

    executable = jax.jit(program).lower(inputs, rest).compile()
    return lambda: executable(inputs, rest)


def interleaved(runs: Sequence[Callable[[], Any]], *, rounds: int = 7, burst: float = 0.02) -> list[float]:
    """The median seconds of a call of each, measured in turn, `rounds` times `burst` seconds.

    In turn, because a GPU's clock follows its temperature: the first of several would seem the fastest.
    """

    def seconds(run: Callable[[], Any], calls: int) -> float:
        start, out = time.perf_counter(), None
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    for run in runs:
        jax.block_until_ready(run())
    calls = [max(2, round(burst / seconds(run, 1))) for run in runs]
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for times, run, count in zip(found, runs, calls, strict=True):
            times.append(seconds(run, count))
    return [statistics.median(times) for times in found]
