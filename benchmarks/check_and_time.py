"""Compiles, checks and times every kernel on one Hopper GPU, within ten minutes.

    python3 benchmarks/check_and_time.py [--commit NAME] [--only WORD ...] [--out benchmarks/results]

Needs jax for CUDA and pytest, with pytest-xdist if there is more than one core; steps for PyTorch are left out where
torch or triton is missing, tests of Triton from JAX where jax-triton is, and that is said. The tests of `tune` time by
themselves, for minutes, and are left to `pytest -m gpu`. Tests come first: what fails them is not timed. JSON lines are
appended to the files in `--out`, the output of each step goes to a log beside them. The exit status is 1 if a step
failed or did not come to its end. Afterwards, `kernels_table.py`, `kernels_plot.py` and `tuned_rows.py` renew what is
made of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 590


@dataclass(frozen=True)
class Step:
    """`seconds`: after which it is stopped. `needs`: modules without which it is left out."""

    name: str
    command: list[str]
    seconds: int
    needs: tuple[str, ...] = ()


def steps(out: Path, commit: str) -> list[Step]:
    python, named = sys.executable, ["--commit", commit] if commit else []
    workers = min(8, os.cpu_count() or 1)
    parallel = ["-n", str(workers), "-p", "no:benchmark"] if workers > 1 and _has("xdist") else []
    timed = [python, "benchmarks/kernels.py", *named]
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-k", wanted(), *parallel, "tests"]
    return [
        Step("tests", tests, 250, ("pytest",)),
        Step("kernels", [*timed, "--budget", "140", "--out", str(out / "kernels.jsonl")], 180),
        Step("train", [*timed, "--train", "--quick", "--out", str(out / "train_step.jsonl")], 100),
        Step(
            "triton",
            [python, "benchmarks/triton_kernels.py", "--json", str(out / "triton_kernels.jsonl"), "--seconds", "30"],
            60,
            ("torch", "triton"),
        ),
    ]


def wanted() -> str:
    """Which of the tests for a GPU."""
    return "not tune" if _has("jax_triton") else "not tune and not triton"


def run(step: Step, log: Path, seconds: float) -> int | None:
    """The exit status, or None for one that was stopped."""
    # Beside each other, processes of JAX would each take three quarters of the memory.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([".", "interop", "examples", os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
        **({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if step.name == "tests" else {}),
    }
    with log.open("w") as file:
        try:
            return subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def record_tests(log: Path, commit: str, out: Path) -> None:
    """A line on the tests, as the others in `gpu_tests.jsonl`."""
    import jax  # only now: the device is free again

    last = log.read_text().strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    line = {
        "command": f"pytest -m gpu -k '{wanted()}'",
        **{"passed": 0, "failed": 0, **counts},
        "gpu": jax.devices()[0].device_kind,
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or "unknown",
    }
    with (out / "gpu_tests.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="", help="what to write as the commit where this is no git repository")
    names = [step.name for step in steps(Path(), "")]
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="steps to take")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="the folder of the results")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    began, bad = time.monotonic(), []
    for step in steps(out, options.commit):
        if step.name not in options.only:
            continue
        if missing := [module for module in step.needs if not _has(module)]:
            print(f"{step.name}: left out, without {', '.join(missing)}", flush=True)
            continue
        log, start = out / f"{step.name}.log", time.monotonic()
        status = run(step, log, min(step.seconds, max(1, began + SECONDS - start)))
        told = "stopped, for want of time" if status is None else "well" if status == 0 else f"failed ({status})"
        told += f" ({wanted()})" if step.name == "tests" else ""
        print(f"{step.name}: {told}, {time.monotonic() - start:.0f} s, {log}", flush=True)
        print(
            "".join(f"  {line}\n" for line in log.read_text().splitlines()[-(4 if status == 0 else 25) :]), flush=True
        )
        bad += [] if status == 0 else [step.name]
        if step.name == "tests":
            if status is not None:
                record_tests(log, options.commit, out)
            if status:
                break
    print(f"{time.monotonic() - began:.0f} s in all" + (f"; not well: {', '.join(bad)}" if bad else ""))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
