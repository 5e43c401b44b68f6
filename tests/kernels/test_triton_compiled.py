"""What the shipped configurations need of a Hopper GPU, from machine code compiled without one."""

import json
import os
import subprocess
import sys

import pytest

from lora_jax.kernels.triton_configs import SHARED_BYTES

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

SPILLED = 64  # bytes a thread: what a few cold values take, not a loop's


# PyTorch goes by descriptors on Hopper, everybody else by pointers; JAX alone launches `triton_gemm`. Rank 64 fills
# registers and shared memory most of those that are ready before the walk over K, rank 256 of those that come after it.
@pytest.mark.parametrize(
    "arch,how",
    [
        (90, ["--ranks", "64", "256"]),
        (89, ["--ranks", "64", "--jax"]),
        (90, ["--ranks", "64", "256", "--jax"]),
    ],
)
def test_the_heaviest_configurations_fit(arch: int, how: list[str]) -> None:
    """Of large layers in bfloat16. All others: `python -m tests.kernels.triton_compiled`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton_compiled", "--large", "--arch", str(arch), *how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"down", "outer"} | ({"gemm"} if "--jax" in how else {"up", "hopper_gemm", "hopper_adapted"})
    assert {line["kernel"] for line in lines} == kernels
    for line in lines:
        assert 0 < line["shared"] <= SHARED_BYTES[divmod(arch, 10)], line
        assert line["spilled"] <= SPILLED, line
