"""What the shipped configurations need of a Hopper GPU, from machine code compiled without one."""

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

SHARED_MEMORY = 227 * 1024  # of one program on Hopper
SPILLED = 64  # bytes a thread: what a few cold values take, not a loop's


def test_the_heaviest_configurations_fit() -> None:
    """Large layers at the ranks that fill registers and shared memory most: before and after the walk over K.

    All others: `python -m tests.kernels.triton_compiled`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton_compiled", "--ranks", "64", "256", "--large"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in lines} == {"gemm", "down", "outer"}
    for line in lines:
        assert 0 < line["shared"] <= SHARED_MEMORY, line
        assert line["spilled"] <= SPILLED, line
