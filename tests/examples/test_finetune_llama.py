"""The example script, run as a user runs it, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cli import tiny

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_llama.py"


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_it_learns_and_exports(front_end, tmp_path):
    tiny.write_tiny_llama(tmp_path / "llama")
    tiny.write_text(tmp_path / "text.txt")
    out = tmp_path / "adapter"
    words = ["--steps", "60", "--length", "16", "--model", "llama", "--text", "text.txt", "--out", "adapter"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), front_end, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    before, after = (float(x) for x in re.findall(r"held-out perplexity ([\d.]+)", done.stdout))
    assert after < 0.9 * before
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 14 and all(np.abs(x).max() > 0 for x in tensors.values())
