"""Models on several devices: `shard_map` around and inside them, and meshes with explicit axes.

Devices are chosen when JAX starts, so the checks run in a process of their own that sees two CPU devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "case", ["inside_shard_map", "around_shard_map", "explicit_mesh", "constrained", "dropout_masks"]
)
def test_two_devices(case):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    code = f"from tests.core import two_devices; two_devices.{case}()"
    env = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
