"""The dispatcher: options, YAML, and errors that end as one line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from lora_jax.cli import COMMANDS, Command, main


@dataclass(frozen=True)
class Optim:
    """Args:
    lr: The learning rate.
    """

    lr: float = 1e-3
    steps: int = 10


@dataclass(frozen=True)
class Job:
    """A job.

    Args:
        out: Where.
        optim: How.
        dry_run: Whether to stop early.
    """

    out: str
    optim: Optim = field(default_factory=Optim)
    dry_run: bool = False


seen: list[Job] = []


def job(config: Job) -> int:
    """Run a job."""
    seen.append(config)
    if config.out == "crash":
        raise RuntimeError("our fault")
    return 7


@pytest.fixture
def command(monkeypatch):
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "cli_test_commands", module)
    monkeypatch.setitem(COMMANDS, "job", Command("cli_test_commands:job", "a job"))
    seen.clear()


def error_line(capsys) -> str:
    """The one line of an error; more than one is a failure."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_overview_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and entry.help in out for name, entry in COMMANDS.items())


def test_overview_imports_nothing_heavy():
    code = (
        "import sys, lora_jax; before = set(sys.modules); from lora_jax.cli import main; main(['--help']);"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before};"
        "print(sorted(new & {'jsonargparse', 'rich', 'numpy', 'safetensors', 'matplotlib', 'jax', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "name, told",
    [
        ("inspect", "How many singular values of the update"),
        ("diff", "relative differences are relative to it"),
        ("merge", "it must not exist yet"),
    ],
)
def test_help_explains_the_options(capsys, name, told):
    """The texts are those of the docstrings' `Args:`."""
    assert main([name, "--help"]) == 0
    assert told in " ".join(capsys.readouterr().out.split())


def test_unknown_command_names_the_closest(capsys):
    assert main(["inspct"]) == 2
    assert "did you mean inspect?" in error_line(capsys)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--out", "x"], Job("x")),
        (["--out", "x", "--dry-run"], Job("x", dry_run=True)),
        (["--dry_run", "false", "--out=x"], Job("x")),
        (["--out", "x", "--optim.lr", "0.5", "--dry-run", "--optim.steps=3"], Job("x", Optim(0.5, 3), True)),
    ],
)
def test_dataclass_options(command, words, expected):
    assert main(["job", *words]) == 7
    assert seen == [expected]


def test_yaml_and_overrides(command, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("out: y\noptim:\n  lr: 0.25\n  steps: 4\n")
    assert main(["job", "--config", str(path), "--optim.steps", "5"]) == 7
    assert seen == [Job("y", Optim(0.25, 5))]
    # What --print_config prints is a configuration again.
    assert main(["job", "--config", str(path), "--optim.lr", "2", "--print-config"]) == 0
    path.write_text(capsys.readouterr().out)
    assert main(["job", "--config", str(path)]) == 7
    assert seen[1] == Job("y", Optim(2.0, 4))


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "out"),
        (["--out", "x", "--optim.lrr", "1"], "optim.lr"),
        (["--out", "x", "--optim.l", "1"], "optim.l"),
        (["--out", "x", "--optim.lr", "fast"], "optim.lr"),
        (["--out", "x", "surplus"], "surplus"),
        (["--out", "x", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_misuse_is_one_line(command, capsys, words, told):
    assert main(["job", *words]) == 2
    line = error_line(capsys)
    assert told in line and "lora-jax job --help" in line
    assert not seen


def test_misspelt_yaml_key(command, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("out: y\noptim:\n  lrr: 0.25\n")
    assert main(["job", "--config", str(path)]) == 2
    assert "lrr" in error_line(capsys)


def test_our_own_faults_keep_their_traceback(command):
    with pytest.raises(RuntimeError, match="our fault"):
        main(["job", "--out", "crash"])


def test_traceback_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_JAX_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        main(["inspect", str(tmp_path)])


def test_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lora_jax.cli", "inspect", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "adapter_config.json" in done.stderr and "Traceback" not in done.stderr
