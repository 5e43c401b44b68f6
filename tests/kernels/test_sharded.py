"""Products split over a mesh of four devices, in a process of their own: devices are chosen when JAX starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
from tests.kernels import sharded
for name in sharded.CASES:
    sharded.{how}(name)
"""
ONE = "from tests.kernels import sharded; sharded.{how}()"


@pytest.mark.parametrize(
    "how, code", [("automatic", RUN), ("explicit", RUN), ("manual", ONE), ("no_names", ONE), ("lowered_for_cuda", ONE)]
)
def test_four_devices(how, code):
    env = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-c", code.format(how=how)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
