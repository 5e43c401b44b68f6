"""Adapted linear layers in PyTorch, side by side on one GPU, as ratios to the frozen linear.

    PYTHONPATH=.:interop python3 benchmarks/torch_lora.py [--quick] [--out FILE] [--shape M,K,N,R]

Needs torch and triton; real `peft` takes part where it is installed, NeMo Automodel's `TritonLinearLoRA` too
(`nemo-automodel` 0.7.0, of whose requirements this part imports torch, triton and transformers). Every candidate is
first compared with the float64 result: y, dx, dA and dB. One JSON line a figure; a table comes last, and
`torch_table.py` writes that of the docs.

Times are CUDA events around bursts of calls on inputs that take turns. What Python needs to launch counts where the GPU
has to wait for it (`host_us` is that time alone); "captured" passes are replays of a CUDA graph, where it does not. The
frozen linear runs before and after each candidate, and a ratio is taken to the mean of the two: a GPU is faster after a
pause than in the middle of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn

from benchmarks.torch_layers import ALPHA_PER_RANK, MAKERS, NEMO, OTHERS, SETTINGS, WITHOUT_DROPOUT, nemo_kernels

SHAPES = [
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 64),
    (16384, 8192, 8192, 64),
    (2048, 2048, 8192, 16),
]
SMALL = 2**36  # multiplications, up to which Python may take longer than the GPU: the rows of `SETTINGS` are for these
SETS = 3  # of inputs and weights that take turns, so that none is found in the L2 cache
# Norm of the error over norm of the result: bfloat16 rounds by up to 2**-9, and eager code does so three times.
ALLOWED = 2.0**-7
NEMO_PARTS = 7  # its candidate tiles are compiled by so many processes
CAPTURED = ", captured"
KINDS = ("forward", "forward + backward", "forward" + CAPTURED, "forward + backward" + CAPTURED)


class Candidate:
    """One kind of layer on `SETS` weights and inputs."""

    def __init__(self, row: str, shape: tuple[int, ...], rate: float, sets: int = SETS):
        m, k, n, r = shape
        self.row, self.calls = row, []
        self.setting = SETTINGS.get(row, contextlib.nullcontext)
        for seed in range(sets):
            generator = torch.Generator("cuda").manual_seed(seed)

            def normal(*size: int, std: float = 1.0, generator=generator) -> torch.Tensor:
                return (torch.randn(*size, generator=generator, device="cuda") * std).bfloat16()

            linear = nn.Linear(k, n, bias=False, device="meta")
            linear.weight = nn.Parameter(normal(n, k, std=k**-0.5), requires_grad=False)
            x, dy = normal(m, k).requires_grad_(), normal(m, n)
            layer: Any = linear
            factors: list[nn.Parameter] = []
            if row != "frozen":
                layer = MAKERS[row](linear, r, rate)
                named = dict(layer.named_parameters())
                factors = [next(p for name, p in named.items() if each in name) for each in ("lora_A", "lora_B")]
                for factor, value in zip(factors, (normal(r, k, std=k**-0.5), normal(n, r)), strict=True):
                    factor.data.copy_(value)
            self.calls.append((layer, x, dy, [x, *factors], linear.weight))
        self.turn = itertools.cycle(self.calls)

    def forward(self) -> None:
        layer, x, *_ = next(self.turn)
        with torch.no_grad(), self.setting():
            layer(x)

    def both(self) -> None:
        layer, x, dy, wanted, _ = next(self.turn)
        with self.setting():
            torch.autograd.grad(layer(x), wanted, dy)

    def error(self) -> tuple[float, float]:
        """The worst relative error of y, dx, dA and dB, and the least one that a layer without its adapter has."""
        layer, x, dy, wanted, weight = self.calls[0]
        with self.setting():
            y = layer(x)
            found = [y.detach(), *torch.autograd.grad(y, wanted, dy)]
        a, b = wanted[1].detach().double(), wanted[2].detach().double()
        x, w, dy = x.detach().double(), weight.double(), dy.double()
        h, g = ALPHA_PER_RANK * x @ a.T, ALPHA_PER_RANK * dy @ b
        base = [x @ w.T, dy @ w, torch.zeros_like(a), torch.zeros_like(b)]
        want = [base[0] + h @ b.T, base[1] + g @ a, g.T @ x, dy.T @ h]
        distance = [float((u.double() - v).norm() / v.norm()) for u, v in zip(found, want, strict=True)]
        without = [float((u - v).norm() / v.norm()) for u, v in zip(base, want, strict=True)]
        return max(distance), min(without)


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """Replays of a CUDA graph of SETS calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(SETS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(SETS):
            call()
    return graph.replay


def burst(call: Callable[[], None], count: int) -> float:
    """Microseconds a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / count


def host(call: Callable[[], None], count: int = 20) -> float:
    """Microseconds that Python takes to hand a call to an idle GPU."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(frozen: Candidate, candidates: list[Candidate], kind: str, rounds: int, seconds: float):
    """A row for the frozen linear and for each candidate."""
    graphs = kind.endswith(CAPTURED)
    per_call = SETS if graphs else 1
    calls, counts = {}, {}
    for each in (frozen, *candidates):
        call = each.both if "backward" in kind else each.forward
        try:
            for _ in range(SETS):
                call()
            call = captured(call) if graphs else call
        except Exception as error:
            if each.row not in OTHERS:
                raise
            print(f"{each.row}, {kind}: left out, {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            continue
        calls[each.row], counts[each.row] = call, max(3, round(seconds * 1e6 / burst(call, 5)))
    times: dict[str, list[float]] = {row: [] for row in calls}
    ratios: dict[str, list[float]] = {row: [] for row in calls if row != "frozen"}

    def timed(row: str) -> float:
        times[row].append(burst(calls[row], counts[row]) / per_call)
        return times[row][-1]

    burst(calls["frozen"], counts["frozen"])
    for _ in range(rounds):
        before = timed("frozen")
        for row in ratios:
            here = timed(row)
            after = timed("frozen")
            ratios[row].append(2 * here / (before + after))
            before = after
    for row, call in calls.items():
        low, _, high = statistics.quantiles(ratios.get(row) or [1.0, 1.0], n=4, method="inclusive")
        yield {
            "row": row,
            "median_us": round(statistics.median(times[row]), 2),
            "ratio": round(statistics.median(ratios.get(row) or [1.0]), 4),
            "ratio_spread": [round(low, 4), round(high, 4)],
        } | ({} if graphs else {"host_us": round(host(call), 1)})


def rows_of(shape: tuple[int, ...], names: list[str], rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    wrong: set[str] = set()
    for rate in (0.0, 0.1):
        frozen, candidates = Candidate("frozen", shape, 0.0), []
        for row in names:
            if row in wrong or rate and row in WITHOUT_DROPOUT:
                continue
            if row in SETTINGS and math.prod(shape[:3]) > SMALL:
                continue
            try:
                candidate = Candidate(row, shape, rate)
                error, without = (0.0, 1.0) if rate else candidate.error()
            except Exception as error:
                if row not in OTHERS:
                    raise
                print(f"{row}: left out, {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                wrong.add(row)
                continue
            if not rate:
                yield {"row": row, "pass": "check", "rate": rate, "error": error, "error_without_adapter": without}
            if not error <= ALLOWED < without:
                told = f"{row} {shape} is wrong: error {error:.1e}, without the adapter {without:.1e}"
                if row not in OTHERS:
                    raise SystemExit(told)
                print(f"left out: {told}", file=sys.stderr)
                wrong.add(row)
                continue
            candidates.append(candidate)
        for kind in KINDS:
            for row in measure(frozen, candidates, kind, rounds, seconds):
                yield {"pass": kind, "rate": rate} | row


def compiled(task: tuple[str, tuple[int, ...], float, int]) -> str | None:
    """Runs a candidate once in a process of its own: what was compiled is then found in the caches on disk."""
    row, shape, rate, part = task
    try:
        if row == NEMO:
            for kernel in nemo_kernels():
                kernel.configs = kernel.configs[part::NEMO_PARTS]
        candidate = Candidate(row, shape, rate, sets=1)
        candidate.forward()
        candidate.both()
        torch.cuda.synchronize()
        return None
    except Exception as error:
        return f"{row} {shape} dropout {rate}: {type(error).__name__}: {str(error)[:300]}"


def compile_all(shapes: list[tuple[int, ...]], names: list[str], workers: int) -> None:
    rows = [row for row in ("TritonLinearLoRA", "torch.compile") if row in names]
    tasks = [(row, shape, rate, 0) for shape in shapes for row in rows for rate in (0.0, 0.1)]
    if NEMO in names and importlib.util.find_spec("nemo_automodel"):
        one_of_each_rank = {shape[3]: shape for shape in shapes}.values()
        tasks = [(NEMO, s, 0.0, part) for s in one_of_each_rank for part in range(NEMO_PARTS)] + tasks
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for failure in filter(None, pool.map(compiled, tasks)):
            print(f"cannot run {failure}", file=sys.stderr, flush=True)


def about(commit: str | None) -> dict[str, Any]:
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **{name: version(name) for name in ("peft", "nemo_automodel") if importlib.util.find_spec(name)},
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or git.stdout.strip() or "unknown",
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a folder on the path
        return "unknown"


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for rate, kind in itertools.product((0.0, 0.1), KINDS):
        here = [row for row in rows if row["pass"] == kind and row["rate"] == rate]
        names = list(dict.fromkeys(row["row"] for row in here if row["row"] != "frozen"))
        lines.append(f"\n{kind}, dropout {rate}: microseconds of the frozen linear, then ratios to it")
        lines.append(" | ".join(["M,K,N,R", "frozen", *names]))
        for shape in dict.fromkeys(row["shape"] for row in here):
            found = {row["row"]: row for row in here if row["shape"] == shape}
            ratios = [f"{found[name]['ratio']:.3f}" if name in found else "" for name in names]
            lines.append(" | ".join([shape, f"{found['frozen']['median_us']:.0f}", *ratios]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first and the last shape, three rounds")
    parser.add_argument("--shape", action="append", help="M,K,N,R instead of the five shapes; may be repeated")
    parser.add_argument("--without", nargs="+", default=[], choices=list(MAKERS), help="rows to leave out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.04, help="of one burst")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--stop-after", type=float, default=1e9, help="begin no new shape after so many seconds")
    parser.add_argument("--commit", help="what to write as the commit where this is no git repository")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file instead of printing them")
    options = parser.parse_args()
    shapes = [tuple(map(int, text.split(","))) for text in options.shape or []] or SHAPES
    if options.quick:
        shapes, options.rounds = [shapes[0], shapes[-1]], 3
    names = [row for row in MAKERS if row not in options.without]
    common, rows, start = about(options.commit), [], time.perf_counter()
    compile_all(shapes, names, options.workers)
    print(f"compiled after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    for shape in shapes:
        if time.perf_counter() - start > options.stop_after:
            print(f"no time left for {shape}", file=sys.stderr)
            break
        torch._dynamo.reset()
        for row in rows_of(shape, names, options.rounds, options.seconds):
            rows.append({"shape": ",".join(map(str, shape))} | row)
            line = json.dumps(common | rows[-1])
            if options.out is None:
                print(line, flush=True)
            else:
                with options.out.open("a") as file:
                    print(line, file=file)
        torch.cuda.empty_cache()
    print(table(rows))


if __name__ == "__main__":
    main()
