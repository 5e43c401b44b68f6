"""What a newcomer gets wrong: each mistake is one line that names the file or option; nothing is lost or ignored."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from lora_jax.cli import main
from lora_jax.cli.training.config_files import read_config
from lora_jax.cli.training.verify import make_up
from tests.cli import tiny

pytestmark = pytest.mark.pinned

FEW = {"optim.steps": 2, "sample.prompt": "", "data.held_out": 4, "checkpoint_every": 2, "eval_every": 2}


def failed(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main([*words]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """The folder of a finished run, `run`, and of what it was made from."""
    folder = tmp_path_factory.mktemp("language")
    options = tiny.write_causal_lm(folder, **FEW)
    assert main(["train", "--config", str(options), "--output_dir", str(folder / "run")]) == 0
    return folder


def _config(**changes):
    def edit(llama):
        path = llama / "config.json"
        path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v != ()}))

    return edit


def _larger_tokens(llama):
    path = llama / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] = {word: n + 100 for word, n in tokenizer["model"]["vocab"].items()}
    tokenizer["added_tokens"] = []
    path.write_text(json.dumps(tokenizer))


def _cut(llama):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


BASES = {
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no tokenizer in it": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json describes no tokenizer"),
    "another model's tokenizer": (_larger_tokens, "but the model's vocabulary has 32"),
    "no sizes": (_config(hidden_size=()), "`hidden_size` is missing"),
    "sizes in words": (_config(num_hidden_layers="one"), "`num_hidden_layers` is 'one'"),
    "truncated": (_cut, "model.safetensors is damaged"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "quantised": (_config(quantization_config={"bits": 4}), "is quantised"),
}


@pytest.mark.parametrize("case", BASES)
def test_unusable_bases(case, language, tmp_path, capsys):
    spoil, told = BASES[case]
    spoil(shutil.copytree(language / "llama", tmp_path / "llama"))
    words = ["train", "--config", str(language / "options.yaml"), "--model.path", str(tmp_path / "llama")]
    assert told in failed(capsys, *words, "--output_dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_gguf_is_named(language, tmp_path, capsys):
    for name, content in (("short", b"GGUF"), ("other", b"\x00" * 4096)):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        words = ["plan", "--config", str(language / "options.yaml"), "--model.path", str(path)]
        assert f"{path} is damaged or is no GGUF file" in failed(capsys, *words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--optim.lr", "-1"], "optim.lr is -1.0; it must be positive"),
        (["--optim.clip_norm", "-1"], "optim.clip_norm is -1.0; it must be at least 0"),
        (["--optim.weight_decay", "-1"], "optim.weight_decay is -1.0"),
        (["--sample.tokens", "0"], "sample.tokens is 0"),
        (["--lora.dtype", "int8"], "`dtype=int8` cannot be trained"),
    ],
)
def test_values_out_of_range(words, told, language, capsys):
    assert told in failed(capsys, "train", "--config", str(language / "options.yaml"), *words)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"task": ["causal-lm"]}, "task"),
        ({"lora.dtype": "int8"}, "`dtype=int8` cannot be trained"),
        ({"optim.steps": 0}, "optim.steps is 0"),
        ({"lora": 3}, "lora"),
        ({"data": None}, "`data` is empty"),
    ],
)
def test_a_file_with_impossible_values_is_named(options, told, tmp_path, capsys):
    path = tiny.write_options(tmp_path / "bad.yaml", **options)
    for words in (
        ["train", "--config", str(path), "--output_dir", str(tmp_path / "run")],
        ["eval", str(path), "--adapter", "x"],
    ):
        assert told in failed(capsys, *words)
    assert str(path) in failed(capsys, "eval", str(path), "--adapter", "x")
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_model_reads(tmp_path, capsys):
    """JAX would give NaNs for positions that a BERT does not have."""
    options = tiny.write_classification(tmp_path)
    words = ["train", "--config", str(options), "--output_dir", str(tmp_path / "run"), "--data.length"]
    assert "data.length=17, but this model has only 16 positions" in failed(capsys, *words, "17")


def test_texts_in_another_encoding_are_named(language, tmp_path, capsys):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café ".encode("latin-1") * 100)
    words = ["train", "--config", str(language / "options.yaml"), "--data.path", str(latin)]
    assert f"{latin} is no UTF-8 text" in failed(capsys, *words)
    options = tiny.write_classification(tmp_path)
    table = tmp_path / "reviews.csv"
    rows = table.read_bytes()
    table.write_bytes(rows + b"caf\xe9,1\n")
    assert f"{table} is no UTF-8 text" in failed(capsys, "plan", "--config", str(options))
    table.write_bytes(b"\xef\xbb\xbf" + rows)  # as spreadsheets write it
    assert main(["plan", "--config", str(options)]) == 0


def test_nothing_stands_in_for_an_adapter(language, capsys):
    """A YAML file alone would show the base's numbers under the name of LoRA."""
    options, run = str(language / "options.yaml"), str(language / "run")
    for words in (["eval", options], ["generate", options], ["eval", f"{run}/config.yaml"]):
        assert "add --adapter PEFT_DIRECTORY" in failed(capsys, *words)
    assert main(["generate", options, "--base", "--tokens", "1", "--prompt", "good"]) == 0
    assert "it must be at least 1" in failed(capsys, "generate", run, "--tokens", "0")
    assert "nowhere does not exist" in failed(capsys, "eval", "nowhere")


@pytest.mark.parametrize(
    ("source", "words", "told"),
    [
        ("run/adapter", ["--target", "vllm"], "--target would have no effect"),
        ("run/adapter", ["--step", "2", "--task_type", "CAUSAL_LM"], "--step, --task_type would have no effect"),
        ("run", ["--model", "x.yaml"], "--model would have no effect"),
        ("run/checkpoints/2", ["--step", "2"], "--step would have no effect"),
    ],
)
def test_export_ignores_no_option(source, words, told, language, tmp_path, capsys):
    assert told in failed(capsys, "export", str(language / source), str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_only_runs_are_overwritten_and_only_when_asked(language, tmp_path, capsys):
    words = ["train", "--config", str(language / "options.yaml"), "--output_dir"]
    assert "holds no run to resume" in failed(capsys, *words, str(tmp_path / "none"), "--resume")
    assert not (tmp_path / "none").exists()
    project = tmp_path / "project"
    project.mkdir()
    for name in ("config.yaml", "thesis.tex"):
        (project / name).write_text("title: mine")
    assert "exists and is not a run" in failed(capsys, *words, str(project), "--overwrite")
    run = shutil.copytree(language / "run", tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "checkpoints" / "99").mkdir()
    kept = (run / "metrics.jsonl").read_bytes()
    assert "--resume" in (told := failed(capsys, *words, str(run))) and "--overwrite" in told
    assert (run / "metrics.jsonl").read_bytes() == kept and (run / "checkpoints" / "99").exists()
    assert main([*words, str(run), "--overwrite", "--optim.lr", "0.5"]) == 0
    assert (run / "metrics.jsonl").read_bytes() != kept
    assert (run / "notes.txt").read_text() == "mine" and not (run / "checkpoints" / "99").exists()
    assert sorted(p.name for p in project.iterdir()) == ["config.yaml", "thesis.tex"]


@pytest.mark.parametrize("line", ["garbage", "[]", '{"kind": "train"}', '{"step": "1", "kind": "train"}'])
def test_a_damaged_line_of_the_metrics_is_named(line, language, tmp_path, capsys):
    run = shutil.copytree(language / "run", tmp_path / "run")
    metrics = run / "metrics.jsonl"
    count = len(metrics.read_text().splitlines())
    metrics.write_text(metrics.read_text() + line + "\n")
    words = ["train", "--config", str(run / "config.yaml"), "--output_dir", str(run), "--resume"]
    assert f"{metrics}, line {count + 1} is no record" in failed(capsys, *words)


def test_a_run_is_found_from_another_folder(tmp_path, monkeypatch, capsys):
    """Relative paths are those of the folder in which the run was started."""
    tiny.write_causal_lm(tmp_path, **FEW, **{"model.path": "llama", "data.path": "text.txt", "output_dir": "run"})
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "options.yaml"]) == 0
    assert main(["train", "--config", "options.yaml", "--resume"]) == 0  # the same options, relative again
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["eval", "../run"]) == 0
    assert main(["train", "--config", "../run/config.yaml", "--resume"]) == 0
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == []
    assert read_config(tmp_path / "run" / "config.yaml").model.path == str(tmp_path / "llama")
    told = failed(capsys, "train", "--config", "../run/config.yaml", "--resume", "--data.path", "text.txt")
    assert "data.path: " in told and "elsewhere/text.txt" in told


def test_without_torch_the_last_lines_say_so_and_what_to_do(language, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(language / "run", tmp_path / "run")
    monkeypatch.setattr("lora_jax.cli.training.verify.NEEDED", ("torch_that_is_not_here", "peft"))
    words = ["train", "--config", str(run / "config.yaml"), "--output_dir", str(run), "--resume", "--verify", "auto"]
    capsys.readouterr()
    assert main(words) == 0
    *_, told, command = capsys.readouterr().out.splitlines()
    # Where peft is missing as well, it is named beside it.
    assert re.match("NOT CHECKED by PyTorch's peft: torch_that_is_not_here(, peft)? not installed", told)
    assert command.strip() == make_up(run) and command.count("&&") == 1
    assert f"{sys.executable} -m pip install " in command and f"--config {run / 'config.yaml'} --resume" in command
    tested = (Path(__file__).parents[2] / "requirements" / "parity.txt").read_text().split()
    # Triton and torchao are there for other tests; peft needs neither.
    needed = {word for word in tested if "==" in word and not word.startswith(("triton", "torchao"))}
    assert set(command.split("&&")[0].split()[4:]) == needed


def test_help_explains_the_fields_of_the_adapter(capsys):
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "modules trained in full beside the factors" in shown and "delta = (alpha / rank) * A @ B" in shown
