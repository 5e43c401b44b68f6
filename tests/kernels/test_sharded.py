"""Products split over a mesh of four devices, in a process of their own: devices are chosen when JAX starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EACH = "for name in {module}.CASES: {module}.{how}(name)"
HOW = {
    "automatic": f"{EACH.format(module='sharded', how='automatic')}\nsharded.manual()\nsharded.no_names()",
    "explicit": f"{EACH.format(module='sharded', how='explicit')}\nsharded.lowered_for_cuda()",
    "automatic group": EACH.format(module="sharded_group", how="automatic"),
    "automatic many": f"{EACH.format(module='many_stacks', how='automatic')}\nmany_stacks.manual()",
    "explicit group": EACH.format(module="sharded_group", how="explicit"),
}


@pytest.mark.parametrize("how", HOW)
def test_four_devices(how):
    env = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        # Sixteen programs that run once: most of the time would go to making them fast.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-c", f"from tests.kernels import many_stacks, sharded, sharded_group\n{HOW[how]}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
