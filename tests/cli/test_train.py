"""`lora-jax train` and the commands that use its runs, on models and texts small enough to train in a second."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import lora_jax
from lora_jax import checkpoint
from lora_jax.cli import main
from lora_jax.cli.training.config_files import read_config
from lora_jax.cli.training.jobs import chunks, prepare
from lora_jax.cli.training.learners import evaluate, make_learner
from lora_jax.cli.training.opened import open_base
from lora_jax.cli.training.sample import Sampler
from tests.cli import tiny

# Where torch is installed the run ends by reloading its own export there; see also test_train_torch.py.
TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
VERIFY = "always" if TORCH else "auto"


class Trained:
    """A finished run: its options, its directory and what it printed."""

    def __init__(self, options, directory, printed):
        self.options, self.directory, self.printed = options, directory, printed
        self.config = read_config(options)
        self.metrics = tiny.metrics(directory)

    def of(self, **wanted):
        return [r for r in self.metrics if wanted.items() <= r.items()]


def trained(folder, write, **options) -> Trained:
    path = write(folder, verify=VERIFY, **options)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["train", "--config", str(path), "--output_dir", str(folder / "run")])
    assert status == 0, printed.getvalue()
    return Trained(path, folder / "run", printed.getvalue())


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A classifier that has learnt which words are nice."""
    options = {"optim.steps": 40, "eval_every": 15}
    return trained(tmp_path_factory.mktemp("reviews"), tiny.write_classification, **options)


@pytest.fixture(scope="module", params=["linen", "nnx"])
def language(request, tmp_path_factory):
    """A language model in each front end."""
    options = {"model.front_end": request.param}
    return trained(tmp_path_factory.mktemp("language"), tiny.write_causal_lm, **options)


def test_what_a_classification_run_shows(reviews):
    shown = reviews.printed
    assert "bert.encoder.layer.*.attention.self.query.kernel" in shown and "not targeted" in shown
    count = 2 * 2 * 4 * 16 + 16 * 2 + 2  # A and B of query and value; the head
    assert f"trainable params: {count} || all params: " in shown
    assert re.search(r"train 40/40  loss \d\.\d+  [\d,]+ sentences/s  held-out accuracy .*  ETA 0:00", shown)
    for model in ("base", "head alone", "lora"):
        assert re.search(rf"│ {model} +│ +\d+\.\d % │", shown)


def test_metrics_tell_every_step_and_evaluation(reviews):
    steps = reviews.of(kind="train")
    assert [r["step"] for r in steps] == list(range(1, 41))
    assert [r["step"] for r in reviews.of(model="lora")] == [15, 30, 40]
    assert len(reviews.of(model="base")) == len(reviews.of(model="head alone")) == 1
    # It learns: by loss and by accuracy, against guessing.
    assert np.mean([r["loss"] for r in steps[-5:]]) < 0.6 * np.mean([r["loss"] for r in steps[:5]])
    assert reviews.of(model="base")[0]["accuracy"] <= 0.6
    assert reviews.of(model="lora")[-1]["accuracy"] >= 0.9


def test_a_run_leaves_what_it_promises(reviews):
    out = reviews.directory
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The folders orbax writes, the newest at the end of the training.
    saved = checkpoint.restore(out / "checkpoints" / "40")
    assert saved.count() == 2 * 2 * 4 * 16 + 34
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    want = saved["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["lora_B"]["kernel"]
    np.testing.assert_array_equal(tensors[name], np.asarray(want).T)
    assert np.abs(tensors[name]).max() > 1e-3
    assert tensors["base_model.model.classifier.weight"].shape == (2, 16)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == reviews.config.model.path
    card = (out / "adapter" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft" and header["base_model"] == reviews.config.model.path
    accuracy = reviews.of(model="lora")[-1]["accuracy"]
    assert f"| lora | {100 * accuracy:.1f} % |" in card
    # The configuration repeats the run.
    assert read_config(out / "config.yaml").lora == reviews.config.lora


def test_it_ends_with_the_verdict_of_torch_or_says_how_to_get_it(reviews):
    if TORCH:
        found = re.search(
            r"largest logit difference is (\S+) \(the adapter moves logits by up to (\S+)\)", reviews.printed
        )
        assert found and float(found[1]) < 1e-5 and float(found[2]) > 0.1
    else:
        assert (
            "NOT CHECKED by PyTorch's peft: torch" in reviews.printed and " -m pip install torch==" in reviews.printed
        )


def test_what_a_language_run_shows(language):
    shown = language.printed
    assert "model.layers.*.mlp.down_proj.kernel" in shown and "tokens/s" in shown
    first, last = language.of(model="base", kind="held_out")[0], language.of(model="lora", kind="held_out")[-1]
    assert last["perplexity"] < 0.9 * first["perplexity"]
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))
    before, after = language.of(kind="sample")
    assert (before["model"], after["model"]) == ("base", "lora") and before["text"] != after["text"]
    # No encoder, no head: no control.
    assert not language.of(model="head alone")


def test_linen_and_nnx_are_the_same_computation(tmp_path):
    """The same adapter in both front ends: the same losses, step by step, up to rounding."""
    path = tiny.write_causal_lm(tmp_path, **{"lora.init": "random"})
    config = read_config(path)
    linen = make_learner(prepare(config).base, config)
    job = prepare(read_config(tiny.write_options(path, **_flat(path), **{"model.front_end": "nnx"})))
    nnx = make_learner(job.base, read_config(path))
    assert type(linen) is not type(nnx)
    nnx.load(jax.tree.map(np.array, linen.adapter), nnx.state())
    both = [[learner.step(job.batch(config, i), i) for i in range(4)] for learner in (linen, nnx)]
    np.testing.assert_allclose(*both, rtol=1e-5)
    linen.load(jax.tree.map(jnp.zeros_like, linen.adapter), linen.state())
    assert abs(linen.step(job.batch(config, 0), 0) - both[0][0]) > 1e-3  # a dropped adapter would show


def _flat(path):
    return {
        f"{name}.{inner}" if isinstance(value, dict) else name: entry
        for name, value in yaml.safe_load(path.read_text()).items()
        for inner, entry in (value.items() if isinstance(value, dict) else [("", value)])
    }


def test_evaluation_counts_every_row_once(reviews):
    job = prepare(reviews.config)
    learner = make_learner(job.base, reviews.config)
    learner.load(checkpoint.restore(reviews.directory / "checkpoints" / "40"), learner.state())
    by_hand = np.asarray(learner.logits(job.objective.inputs(job.held_out)), np.float64)
    right = by_hand.argmax(-1) == job.held_out["label"]
    log_sum = np.log(np.exp(by_hand).sum(-1))
    loss = log_sum - by_hand[np.arange(len(right)), job.held_out["label"]]
    for size in (7, 20):  # with and without a last batch that has to be filled up
        found = evaluate(learner, job.objective, job.held_out, size)
        assert found["accuracy"] == pytest.approx(right.mean())
        assert found["loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert sum(batch["weight"].sum() for batch in chunks(job.held_out, 7)) == 20


def test_merging_gives_the_trained_model(reviews):
    """The run's checkpoint is all that `merge` needs."""
    job = prepare(reviews.config)
    learner = make_learner(job.base, reviews.config)
    adapter = checkpoint.restore(reviews.directory / "checkpoints" / "40")
    learner.load(adapter, learner.state())
    inputs = job.objective.inputs(job.held_out)
    merged = jax.jit(job.base.model.apply)({"params": lora_jax.merge(job.base.params, adapter)}, *inputs)
    np.testing.assert_allclose(merged, learner.logits(inputs), atol=1e-5)
    assert np.abs(merged - np.asarray(learner.logits(inputs, adapted=False))).max() > 0.1


def test_eval_reads_checkpoints_and_peft_directories(reviews, tmp_path, capsys):
    def evaluated(*words):
        assert main(["eval", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    run = str(reviews.directory)
    last = reviews.of(model="lora")[-1]
    found = evaluated(run)
    assert found["lora"] == pytest.approx({k: last[k] for k in ("accuracy", "loss")}, rel=1e-6)
    assert found["base"]["accuracy"] == reviews.of(model="base")[0]["accuracy"]
    from_peft = evaluated(str(reviews.options), "--adapter", str(reviews.directory / "adapter"))
    assert from_peft["lora"] == pytest.approx(found["lora"], rel=1e-5)
    assert evaluated(run, "--step", "24")["lora"]["loss"] != found["lora"]["loss"]
    assert main(["eval", run, "--step", "23"]) == 2
    assert "no checkpoint of step 23; it has [24, 28, 32, 36, 40]" in capsys.readouterr().err
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_generate(language, capsys):
    def generated(*words):
        assert main(["generate", str(language.directory), "--tokens", "4", *words]) == 0
        return capsys.readouterr().out.strip()

    before, after = language.of(kind="sample")
    assert generated("--base") == ("good film" + before["text"]).strip()
    assert generated("--adapter", str(language.directory / "adapter")) == ("good film" + after["text"]).strip()


def test_sampling_follows_prompt_seed_and_temperature(language):
    _, base, learner = open_base(str(language.directory))
    sampler = Sampler(learner, base.tokenizer, "bad plot", 12)
    assert sampler() == sampler(seed=1)  # at temperature 0 there is nothing to draw
    assert sampler(temperature=3, seed=1) == sampler(temperature=3, seed=1) != sampler(temperature=3, seed=2)
    with pytest.raises(ValueError, match="the prompt is empty"):
        Sampler(learner, base.tokenizer, "", 4)


def test_export_there_and_back(language, tmp_path, capsys):
    run, out = str(language.directory), tmp_path / "out"
    assert main(["export", run, str(out / "peft")]) == 0
    own, again = (load_file(d / "adapter_model.safetensors") for d in (language.directory / "adapter", out / "peft"))
    assert own.keys() == again.keys() and all(np.array_equal(own[k], again[k]) for k in own)
    assert main(["export", str(out / "peft"), str(out / "orbax"), "--model", run]) == 0
    found, want = checkpoint.restore(out / "orbax"), checkpoint.restore(language.directory / "checkpoints" / "12")
    assert {s.path: (s.rank, s.alpha) for s in found.sites} == {s.path: (s.rank, s.alpha) for s in want.sites}
    jax.tree.map(np.testing.assert_array_equal, found.to_dict(), want.to_dict())
    # From the checkpoint alone, without the model, and for a reader that wants the scale inside B.
    assert main(["export", str(out / "orbax"), str(out / "vllm"), "--target", "vllm"]) == 0
    baked = load_file(out / "vllm" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    np.testing.assert_allclose(baked[name], 2 * own[name], rtol=1e-6)
    capsys.readouterr()
    assert main(["export", str(out / "peft"), str(out / "new")]) == 2
    assert "--model RUN_OR_YAML" in capsys.readouterr().err
    assert main(["export", run, str(out / "peft")]) == 2
    assert "exists already" in capsys.readouterr().err
