"""A run that was stopped must go on as if it had not been: same losses, same adapter, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax import checkpoint
from lora_jax.cli import main
from lora_jax.cli.training.config_files import read_config
from lora_jax.cli.training.jobs import prepare, prepare_base
from lora_jax.cli.training.learners import make_learner
from tests.cli import tiny

STEPS = 240
# Dropout, a schedule, momentum and several epochs: all of that has to be where it was.
OPTIONS = {
    "optim.steps": STEPS, "lora.dropout": 0.2, "eval_every": 100, "checkpoint_every": 40, "control": False,
    "optim.lr": 0.005,
}  # fmt: skip


def command(options: Path, out: Path, *more: str) -> list[str]:
    words = ["train", "--config", str(options), "--output_dir", str(out), *more]
    return [sys.executable, "-m", "lora_jax.cli", *words]


def kill_after(step: int, words: list[str], out: Path) -> None:
    """Runs a command and kills it, with no chance to tidy up, once it has done `step` steps."""
    # Compiled as in this process, or the bits would differ.
    as_here = {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(jax.config.read("jax_disable_most_optimizations")))}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **as_here}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and process.poll() is None:
            path = out / "metrics.jsonl"
            if path.is_file() and path.read_text().count('"train"') >= step:
                break
            time.sleep(0.005)
        assert process.poll() is None, f"it ended by itself: {process.communicate()[0].decode()[-2000:]}"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()


def results(out: Path) -> list[dict[str, object]]:
    """The metrics without the times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in tiny.metrics(out)]


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, capsys):
    options = tiny.write_classification(tmp_path, **OPTIONS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(options, whole, "--overwrite")[3:]) == 0
    kill_after(60, command(options, killed), killed)
    # A line cut in two, as a kill while writing leaves it; and a checkpoint that was not finished.
    done = sum(r["kind"] == "train" for r in tiny.metrics(killed))
    assert 60 <= done < STEPS and not (killed / "adapter").exists()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    saved = max(int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdecimal())
    assert 40 <= saved <= done
    (killed / "checkpoints" / f"{saved + 40}.orbax-checkpoint-tmp-7").mkdir()

    assert main(command(options, killed, "--resume")[3:]) == 0
    assert f"going on after step {saved} of {STEPS}" in capsys.readouterr().out
    assert results(killed) == results(whole)
    assert len({r["loss"] for r in results(whole)}) > STEPS / 2
    one, two = (checkpoint.restore(out / "checkpoints" / str(STEPS)) for out in (whole, killed))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    exported = [(out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (whole, killed)]
    assert exported[0] == exported[1]

    assert main(command(options, killed, "--resume", "--optim.lr", "0.1", "--lora.rank", "2")[3:]) == 2
    told = capsys.readouterr().err
    assert "lora.rank: 4 -> 2; optim.lr: 0.005 -> 0.1" in told and str(killed / "config.yaml") in told
    # Its own configuration it goes on from, and finds nothing left to do.
    assert main(["train", "--config", str(killed / "config.yaml"), "--resume"]) == 0
    assert results(killed) == results(whole)


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_the_state_is_all_that_matters(front_end, tmp_path):
    """With the saved state the losses that follow are the same bits; without it they are others."""
    path = tiny.write_causal_lm(tmp_path, **{"model.front_end": front_end, "lora.dropout": 0.3})
    config = read_config(path)
    job = prepare(config)

    def losses(learner, first, last):
        return [learner.step(job.batch(config, i), i) for i in range(first, last)]

    learner = make_learner(job.base, config)
    losses(learner, 0, 5)
    # Through host memory, as a checkpoint would: later steps may reuse the buffers.
    adapter, state = jax.tree.map(np.array, (learner.adapter, learner.state()))
    wanted = losses(learner, 5, 8)

    again = make_learner(prepare_base(config), config)
    again.load(*jax.tree.map(jax.numpy.asarray, (adapter, state)))
    assert losses(again, 5, 8) == wanted

    again.load(jax.tree.map(jax.numpy.asarray, adapter), make_learner(job.base, config).state())
    assert losses(again, 5, 8) != wanted  # without the optimizer's state
