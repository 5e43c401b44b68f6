"""Products split over a mesh of four devices, in a process of their own: devices are chosen when JAX starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
from tests.kernels import {module} as checks
for name in checks.CASES:
    checks.{how}(name)
"""
ONE = "from tests.kernels import {module}; {module}.{how}()"


@pytest.mark.parametrize(
    "module, how, code",
    [
        ("sharded", "automatic", RUN),
        ("sharded", "explicit", RUN),
        ("sharded", "manual", ONE),
        ("sharded", "no_names", ONE),
        ("sharded", "lowered_for_cuda", ONE),
        ("sharded_group", "automatic", RUN),
        ("sharded_group", "explicit", RUN),
    ],
)
def test_four_devices(module, how, code):
    env = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-c", code.format(module=module, how=how)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
