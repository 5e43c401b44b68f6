"""How GPU times are taken: chains of calls in one program, bursts without a pause, the reference around each candidate.

A GPU's clock follows its temperature and power, so that one program is up to 10 % faster after a pause than in the
middle of a long run. Here the reference runs before and after each candidate, and a ratio is taken to the mean of the
two.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from lora_jax.ops.timing import chained

COMPILERS = 14


@dataclass
class Job:
    """`run()` starts `units` units of work and returns what to wait for."""

    row: str
    run: Callable[[], Any]
    units: int = 1
    seconds: list[float] = field(default_factory=list)  # of a unit, in each round
    ratios: list[float] = field(default_factory=list)  # to the reference beside it

    def burst(self, runs: int) -> float:
        """Seconds a unit."""
        jax.block_until_ready(self.run())
        start, out = time.perf_counter(), None
        for _ in range(runs):
            out = self.run()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / runs / self.units


@dataclass(frozen=True)
class Chain:
    """A function to call on each of `inputs` in turn, inside one program: `fn(*inputs[i], *rest)`."""

    row: str
    fn: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]
    rest: tuple[Any, ...]

    def compiled(self) -> Job:
        return Job(self.row, chained(self.fn, self.inputs, self.rest), len(self.inputs))


def written(row: dict[str, Any], out: Path | None) -> None:
    """Appends a JSON line to `out`, or prints it."""
    line = json.dumps(row)
    if out is None:
        print(line, flush=True)
    else:
        with out.open("a") as file:
            file.write(line + "\n")


def compile_all(chains: Sequence[Chain]) -> list[Job]:
    with ThreadPoolExecutor(COMPILERS) as threads:
        return list(threads.map(Chain.compiled, chains))


def measure(reference: Job, candidates: Sequence[Job], *, rounds: int, burst: float) -> None:
    """Fills `seconds` and `ratios`. `burst`: seconds that one measurement lasts."""
    jobs = [reference, *candidates]
    for job in jobs:
        jax.block_until_ready(job.run())
    runs = {id(job): max(2, round(burst / (job.burst(1) * job.units))) for job in jobs}
    reference.burst(runs[id(reference)])
    for _ in range(rounds):
        before = reference.burst(runs[id(reference)])
        reference.seconds.append(before)
        for job in candidates:
            job.seconds.append(job.burst(runs[id(job)]))
            after = reference.burst(runs[id(reference)])
            reference.seconds.append(after)
            job.ratios.append(2 * job.seconds[-1] / (before + after))
            before = after
    reference.ratios = [1.0]


def summary(job: Job) -> dict[str, Any]:
    """Medians, and between which values the middle half of the rounds lies."""
    return {
        "row": job.row,
        "median_us": round(statistics.median(job.seconds) * 1e6, 2),
        "spread_us": [round(1e6 * each, 2) for each in _middle_half(job.seconds)],
        "ratio": round(statistics.median(job.ratios), 4),
        "ratio_spread": [round(each, 4) for each in _middle_half(job.ratios)],
    }


def _middle_half(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
