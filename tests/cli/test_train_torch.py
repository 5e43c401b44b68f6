"""The last step of `lora-jax train`: torch's own peft computes what we compute, and a wrong export does not pass."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.cli import main
from lora_jax.cli.training.opened import open_job
from lora_jax.cli.training.verify import verify
from lora_torch import save_peft
from tests.cli import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("gguf")

VERDICT = re.compile(r"largest logit difference is (\S+) \(the adapter moves logits by up to (\S+)\)")
FEW = {"optim.steps": 4, "sample.prompt": ""}


def trained(folder, options, *more: str) -> str:
    printed = io.StringIO()
    words = ["train", "--config", str(options), "--output_dir", str(folder / "run"), "--verify", "always", *more]
    with contextlib.redirect_stdout(printed):
        assert main(words) == 0, printed.getvalue()
    return printed.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in bfloat16, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    options = tiny.write_causal_lm(folder, **FEW, **{"model.dtype": "bfloat16"})
    return SimpleNamespace(directory=folder / "run", printed=trained(folder, options), options=options)


def test_a_base_from_gguf_is_written_for_torch(tmp_path):
    from tests.examples import test_models_gguf as ggufs

    tokenizer = ggufs.train_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=1000.0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ggufs.write(tmp_path / "model.gguf", model, tokenizer)
    options = tiny.write_causal_lm(tmp_path, **FEW, **{"model.path": str(tmp_path / "model.gguf")})
    (tmp_path / "text.txt").write_text("The year 1999 was long. " * 60)
    found = VERDICT.search(trained(tmp_path, options))
    assert found and float(found[1]) < 1e-5 and float(found[2]) > 0.01

    base = tmp_path / "run" / "base"
    again = transformers.AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-6, rtol=0)
    text = "In 1999, café?"
    assert transformers.AutoTokenizer.from_pretrained(base)(text)["input_ids"] == tokenizer.encode(text).ids
    assert peft.PeftConfig.from_pretrained(tmp_path / "run" / "adapter").base_model_name_or_path == str(base)


def test_bfloat16_has_its_own_bound(run):
    found = VERDICT.search(run.printed)
    assert found and 0 < float(found[1]) < 0.1 * float(found[2])


@pytest.mark.parametrize("fault", ["dropped", "scaled"])
def test_a_wrong_export_does_not_pass(fault, run, tmp_path):
    """What peft would load without a word: factors it does not find, or another alpha."""
    config, job, learner = open_job(str(run.directory), step=4)
    adapter = shutil.copytree(run.directory / "adapter", tmp_path / "adapter")
    base = job.base.directory
    verify(config, job, learner, adapter, base)
    if fault == "dropped":
        path = adapter / "adapter_model.safetensors"
        tensors = {name.replace("down_proj", "dawn_proj"): value for name, value in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    else:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 64}))
    with pytest.warns() if fault == "dropped" else contextlib.nullcontext():
        with pytest.raises(ValueError, match="computes other logits"):
            verify(config, job, learner, adapter, base)


def test_an_adapter_that_does_nothing_proves_nothing(run):
    config, job, learner = open_job(str(run.options))  # fresh: B is zero
    config = dataclasses.replace(config, verify="always")
    target = run.directory.parent / "fresh"
    save_peft(learner.adapter, target, learner.plan, task_type="CAUSAL_LM")
    assert all(np.all(np.asarray(learner.adapter.factors(site)[1]) == 0) for site in learner.adapter.sites)
    with pytest.raises(ValueError, match="its reload proves nothing"):
        verify(config, job, learner, target, job.base.directory)
