"""What `lora-jax train` accepts, refuses and prints before it trains."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import yaml

from lora_jax.cli import main
from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.config_files import TASK_DEFAULTS, differences, read_config, to_dict
from lora_jax.cli.training.jobs import prepare
from lora_jax.cli.training.learners import make_optimizer
from lora_jax.cli.training.progress import progress
from tests.cli import tiny


def failed(capsys, *words: str) -> str:
    assert main([*words]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


def printed_config(capsys, *words: str) -> dict:
    assert main(["train", *words, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_default_is_the_main_job(capsys):
    found = printed_config(capsys)
    assert found["task"] == "classification"
    assert found["lora"]["target_modules"] == ["query", "value"] and found["lora"]["modules_to_save"] == ["classifier"]
    assert (found["lora"]["rank"], found["lora"]["alpha"]) == (8, 16)
    assert (found["optim"]["lr"], found["optim"]["steps"], found["data"]["batch_size"]) == (2e-3, 235, 32)
    assert found["data"]["length"] == 32 and found["data"]["path"] is found["model"]["path"] is None


@pytest.mark.parametrize("way", ["option", "option with =", "file"])
def test_a_task_brings_its_own_defaults(way, capsys, tmp_path):
    words = {
        "option": ["--task", "causal-lm"],
        "option with =": ["--task=causal-lm"],
        "file": ["--config", str(tiny.write_options(tmp_path / "lm.yaml", task="causal-lm"))],
    }[way]
    found = printed_config(capsys, *words, "--optim.steps", "7")
    assert found["optim"]["steps"] == 7  # the user's own
    assert found["optim"]["lr"] == 1e-3 and len(found["lora"]["target_modules"]) == 7
    assert found["lora"]["modules_to_save"] == [] and found["data"]["length"] == 64
    # Every option that a task sets exists.
    flat = {
        f"{k}.{i}" if isinstance(v, dict) else k for k, v in found.items() for i in (v if isinstance(v, dict) else "x")
    }
    assert set(TASK_DEFAULTS["causal-lm"]) <= flat


def test_a_configuration_survives_its_file(tmp_path):
    path = tiny.write_options(
        tmp_path / "a.yaml", **{"task": "causal-lm", "optim.lr": 3e-4, "lora.rank_pattern": {"q": 2}}
    )
    config = read_config(path)
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert read_config(tmp_path / "b.yaml") == config
    other = dataclasses.replace(config, output_dir="x", resume=True, lora=config.lora.replace(rank_pattern={"k": 2}))
    assert differences(config, config) == []
    assert differences(config, other) == ["lora.rank_pattern.k: None -> 2", "lora.rank_pattern.q: 2 -> None"]


def test_misspelt_names_are_refused(capsys, tmp_path):
    assert "did you mean optim.lr" in failed(capsys, "train", "--optim.lrr", "1")
    assert "'lora' does not accept option 'rnak'" in failed(
        capsys, "train", "--config", str(tiny.write_options(tmp_path / "a.yaml", **{"lora.rnak": 4}))
    )
    with pytest.raises(ValueError, match="optm"):
        read_config(tiny.write_options(tmp_path / "b.yaml", **{"optm.lr": 1}))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--optim.steps", "0"], "optim.steps is 0; it must be at least 1"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--model.front_end", "nnx"], "nnx is for task=causal-lm"),
        (["--lora.rank", "0"], "`rank=0` must be a positive whole number"),
        (["--lora.init", "pissa"], "call `adapter, params = inits.pissa(plan, params)`"),
        (["--task", "translation"], "translation"),
        (["--model.path", "nowhere"], "nowhere is not a Hugging Face model directory"),
    ],
)
def test_impossible_options_are_one_line(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in failed(capsys, "train", *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_dry_run_estimates_and_stops(front_end, capsys, tmp_path):
    options = tiny.write_causal_lm(tmp_path, **{"model.front_end": front_end})
    assert main(["train", "--config", str(options), "--output_dir", str(tmp_path / "run"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.kernel" in shown and "trainable params: 576 ||" in shown
    assert "estimated peak" in shown and "activations, gradients" in shown
    assert not (tmp_path / "run").exists()


def test_plan_shows_every_parameter_on_request(capsys, tmp_path):
    options = tiny.write_classification(tmp_path)
    assert main(["plan", "--config", str(options)]) == 0
    brief = capsys.readouterr().out
    assert main(["plan", "--config", str(options), "--all_rows"]) == 0
    full = capsys.readouterr().out
    assert "bert.pooler.dense.kernel" not in brief and "bert.pooler.dense.kernel" in full
    assert "trained in full" in full and "trainable params: 290 ||" in brief and "trainable params: 290 ||" in full
    assert "closest: `query`" in failed(capsys, "plan", "--config", str(options), "--lora.target_modules", "[qeury]")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("text\ngood\n", "lacks ['label']"),
        ("text,label\ngood,1\nbad,poor\n", "line 3: the label is 'poor'"),
        ("text,label\ngood,2\nbad,0\n", "every label from 0"),
        ("text,label\ngood,1\nbad,0\n", "has 2 rows: too few"),
    ],
)
def test_unusable_tables_are_refused(text, told, capsys, tmp_path):
    options = tiny.write_classification(tmp_path)
    (tmp_path / "reviews.csv").write_text(text)
    assert told in failed(capsys, "train", "--config", str(options), "--output_dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_unusable_texts_are_refused(capsys, tmp_path):
    options = tiny.write_causal_lm(tmp_path)
    (tmp_path / "text.txt").write_text("good film " * 20)
    assert "data.batch_size=4 and data.held_out=10 need more" in failed(capsys, "train", "--config", str(options))
    (tmp_path / "empty").mkdir()
    told = failed(capsys, "train", "--config", str(options), "--data.path", str(tmp_path / "empty"))
    assert "has no .txt files" in told


def test_held_out_rows_are_not_trained_on(tmp_path):
    (tmp_path / "a").mkdir()
    config = read_config(tiny.write_classification(tmp_path / "a"))
    job = prepare(config)
    assert (len(job.train["ids"]), len(job.held_out["ids"])) == (220, 20)
    again = prepare(config)
    other = prepare(dataclasses.replace(config, seed=1))
    np.testing.assert_array_equal(job.held_out["ids"], again.held_out["ids"])
    assert not np.array_equal(job.held_out["ids"], other.held_out["ids"])
    # One epoch sees each row once (220 rows hold 13 batches of 16), in an order that depends on the seed.
    rows = np.concatenate([job.batch(config, i)["ids"] for i in range(13)])
    every = {tuple(row) for row in job.train["ids"].tolist()}
    assert len(rows) == 208 and {tuple(row) for row in rows.tolist()} <= every

    (tmp_path / "b").mkdir()
    job = prepare(read_config(tiny.write_causal_lm(tmp_path / "b")))
    stream = np.concatenate([job.train["tokens"], job.held_out["tokens"]]).reshape(-1)
    assert len(job.held_out["tokens"]) == 10 and len(stream) == 3001 // 16 * 16  # 3,000 words and an end mark


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_and_follows_its_schedule(schedule):
    import jax.numpy as jnp

    options = dataclasses.replace(
        TrainConfig().optim, schedule=schedule, lr=0.1, steps=20, warmup_steps=4, clip_norm=0.0
    )
    transform = make_optimizer(options)
    parameter, gradient = jnp.zeros(()), jnp.ones(())
    state, moves = transform.init(parameter), []
    for _ in range(20):  # a constant gradient makes Adam move by the rate itself
        update, state = transform.update(gradient, state, parameter)
        moves.append(-float(update))
    np.testing.assert_allclose(moves[:5], [0.02, 0.04, 0.06, 0.08, 0.1], rtol=1e-4)
    done = np.arange(16) / 16
    wanted = {"constant": np.ones(16), "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}[schedule]
    np.testing.assert_allclose(moves[4:], 0.1 * wanted, rtol=1e-4)


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(capsys, monkeypatch):
    def show():
        with progress("train", 4, every=2) as shown:
            for done in range(1, 5):
                shown.update(done, f"loss {done}")
        return capsys.readouterr().out

    lines = show().splitlines()
    assert [line.partition("  ETA")[0] for line in lines] == ["train 2/4  loss 2", "train 4/4  loss 4"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = show()
    assert "━" in bar and "4/4" in bar and "ETA" in bar and "loss 4" in bar
