"""Models on several devices: `shard_map` around and inside them, and meshes with explicit axes.

Devices are chosen when JAX starts, so the checks run in a process of their own that sees several CPU devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


CASES = {
    ("two_devices", 2): ["inside_shard_map", "around_shard_map", "explicit_mesh", "constrained", "dropout_masks"],
    ("dora_meshes", 2): ["automatic", "explicit"],
    ("mixed_meshes", 4): ["partial_manual", "lookups_and_convolutions"],
    ("inits_meshes", 2): ["automatic", "explicit"],
}


@pytest.mark.parametrize("module, devices", CASES)
def test_several_devices(module, devices):
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    code = f"from tests.core import {module}\n" + "".join(f"{module}.{case}()\n" for case in CASES[module, devices])
    env = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        # As in this process: most of the time would go to making programs fast that run once.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
