"""The PyTorch example, run as a user runs it, on a tiny model; PEFT reads what it writes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.cli import tiny  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_torch.py"


@pytest.mark.filterwarnings("ignore")  # peft and transformers warn of their own deprecations
def test_it_learns_and_peft_reads_it(tmp_path):
    folder = tiny.write_tiny_llama(tmp_path / "llama")
    tiny.write_text(tmp_path / "text.txt")
    words = ["--steps", "150", "--length", "16", "--model", "llama", "--text", "text.txt", "--out", "adapter"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("adapted 7 linear layers, fused 1 MLPs: ")
    before, after = (float(x) for x in re.findall(r"held-out perplexity ([\d.]+)", done.stdout))
    assert after < 0.95 * before

    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    )
    ids = torch.arange(16)[None]
    with torch.no_grad():
        losses = [float(model(ids, labels=ids).loss) for model in (base, adapted)]
    assert all(float(p.abs().max()) > 0 for n, p in adapted.named_parameters() if "lora_" in n)
    assert abs(losses[0] - losses[1]) > 1e-3
