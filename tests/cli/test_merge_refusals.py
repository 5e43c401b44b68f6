"""What `lora-jax merge` refuses, leaving nothing behind: spoilt bases and adapters, and pairs that do not fit."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from lora_jax.cli import main
from tests.cli.merge_models import (
    ADAPTER,
    Q1,
    R4,
    P,
    bert,
    edit_adapter,
    edit_json,
    edit_tensors,
    gpt2,
    llama,
    merge,
    save_pair,
    spread,
)
from tests.cli.merge_models import good as good  # fixtures
from tests.cli.merge_models import one_thread as one_thread

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# peft says so whenever it meets a Conv1D, a tied table or a modules_to_save, which is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def test_an_interrupt_leaves_nothing(good, tmp_path):
    from lora_jax.cli.merge import merge_directories

    def stop(shard):
        assert list(tmp_path.glob(".out.*/model-00001-of-*.safetensors"))
        raise KeyboardInterrupt

    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", wrote=stop)
    assert sorted(tmp_path.rglob("*")) == before


def _truncate(name):
    def change(d):
        path = next(d.glob(name))
        path.write_bytes(path.read_bytes()[:-7])

    return change


def _nan(tensors):
    tensors[Q1 + ".lora_A.weight"][0, 0] = np.nan


def _in_index(d, change):
    path = d / "base" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _drop_base_tensor(d):
    """Removes a tensor from both its shard and the index."""
    name = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((d / "base" / "model.safetensors.index.json").read_text())
    edit_tensors(f"base/{index['weight_map'][name]}", lambda t: t.pop(name))(d)
    _in_index(d, lambda m: m.pop(name))


def _integer_base(d):
    name = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((d / "base" / "model.safetensors.index.json").read_text())
    edit_tensors(f"base/{index['weight_map'][name]}", lambda t: t.update({name: t[name].astype(np.int8)}))(d)


def _eighth_precision_base(d):
    name = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((d / "base" / "model.safetensors.index.json").read_text())
    kind = ml_dtypes.float8_e4m3fn
    edit_tensors(f"base/{index['weight_map'][name]}", lambda t: t.update({name: t[name].astype(kind)}))(d)


BAD = {
    "truncated adapter": (_truncate(ADAPTER), "damaged"),
    "truncated shard": (_truncate("base/model-00003-*.safetensors"), "damaged"),
    "unknown key": (
        edit_adapter(lambda t: t.update({P + "model.layers.0.x": np.ones(3)})),
        "0.x (3,) would overwrite",
    ),
    "stray base tensor": (
        edit_adapter(lambda t: t.update({P + "lm_head.weight": np.ones((48, 32))})),
        "(48, 32) would",
    ),
    "no B": (edit_adapter(lambda t: t.pop(Q1 + ".lora_B.weight")), "no lora_B"),
    "module without factors": (
        edit_adapter(lambda t: [t.pop(f"{Q1}.lora_{x}.weight") for x in "AB"]),
        "model.layers.1.self_attn.q_proj. If that is meant so, pass --partial",
    ),
    "wrong in": (
        edit_adapter(lambda t: t.update({Q1 + ".lora_A.weight": np.ones((4, 31), np.float32)})),
        "is (32, 32) in the base, but A (4, 31) and B (32, 4) make (32, 31)",
    ),
    "transposed": (edit_adapter(lambda t: t.update({Q1 + ".lora_A.weight": t[Q1 + ".lora_A.weight"].T})), "on a rank"),
    "NaN, met in a later shard": (edit_adapter(_nan), "not finite"),
    "unknown layer": (
        edit_adapter(
            lambda t: [
                t.update({f"{P}model.layers.9.self_attn.q_proj.lora_{x}.weight": t[f"{Q1}.lora_{x}.weight"]})
                for x in "AB"
            ]
        ),
        "the base lacks 1 of the 5 tensors",
    ),
    "another adapter": (edit_json("adapter/adapter_config.json", peft_type="IA3"), "'IA3'"),
    "pissa": (
        edit_json("adapter/adapter_config.json", init_lora_weights="pissa"),
        "path_initial_model_for_weight_conversion",
    ),
    "alora": (edit_json("adapter/adapter_config.json", alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "qalora": (
        edit_json("adapter/adapter_config.json", use_qalora=True),
        "`use_qalora=True` is not supported here; `lora_torch.load_peft` reads it",
    ),
    "replication": (edit_json("adapter/adapter_config.json", layer_replication=[[0, 2]]), "layer_replication"),
    "a key from the future": (edit_json("adapter/adapter_config.json", use_magic=True), "use_magic=True"),
    "quantised": (edit_json("base/config.json", quantization_config={"bits": 4}), "quantised"),
    "int8": (_integer_base, "int8"),
    "float8": (_eighth_precision_base, "F8_E4M3"),
    "missing base tensor": (_drop_base_tensor, "the base lacks 1 of the 4 tensors"),
    "missing shard": (lambda d: next((d / "base").glob("*-00002-*")).unlink(), "is missing"),
    "index disagrees": (lambda d: _in_index(d, lambda m: m.popitem()), "disagrees"),
    "index leads elsewhere": (
        lambda d: _in_index(d, lambda m: m.update({"model.norm.weight": "../x.safetensors"})),
        "not the name of a shard",
    ),
    "no index": (lambda d: (d / "base/model.safetensors.index.json").unlink(), "holds neither"),
    "no base": (lambda d: shutil.rmtree(d / "base"), "not a Hugging Face model directory"),
    "no adapter": (lambda d: shutil.rmtree(d / "adapter"), "not a directory"),
    "out exists": (lambda d: (d / "out").mkdir(), "exists already"),
    "bad config.json": (lambda d: (d / "base/config.json").write_text("{"), "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_and_leaves_nothing(good, tmp_path, capsys, case):
    spoil, told = BAD[case]
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert merge(tmp_path) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_unspoilt_pair_merges(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    assert merge(tmp_path) == 0


def test_partial_accepts_missing_modules(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    BAD["module without factors"][0](tmp_path)
    assert merge(tmp_path, "--partial") == 0
    base, out = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("base", "out"))
    changed = {name for name in base if not torch.equal(base[name], out[name])}
    assert changed == {
        f"model.layers.{n}.weight" for n in ("0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.v_proj")
    }


def test_float16_overflow_is_refused(tmp_path, capsys):
    torch.manual_seed(0)
    save_pair(tmp_path, llama().half(), peft.LoraConfig(**R4, target_modules=["q_proj"]))
    edit_adapter(lambda t: t.update({Q1 + ".lora_B.weight": 1e7 * t[Q1 + ".lora_B.weight"]}))(tmp_path)
    assert merge(tmp_path) == 2
    assert "float16" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_out_inside_the_base(good, tmp_path, capsys):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "base" / "out")]) == 2
    assert "inside" in capsys.readouterr().err


def test_a_headless_adapter_on_a_classifier_says_what_to_do(tmp_path, capsys):
    """An adapter of a BertForSequenceClassification on a plain BertModel: its head has no place there."""
    torch.manual_seed(0)
    model = bert()
    save_pair(tmp_path, model, peft.LoraConfig(**R4, target_modules=["query"], task_type="SEQ_CLS"))
    shutil.rmtree(tmp_path / "base")
    transformers.BertModel(model.config).save_pretrained(tmp_path / "base")
    assert merge(tmp_path) == 2
    error = capsys.readouterr().err
    assert "classifier.weight" in error and "save the base from that class first" in error


def test_missing_modules_are_seen_through_a_prefix(tmp_path, capsys):
    torch.manual_seed(0)
    spread(gpt2("GPT2Model")).save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(**R4, target_modules=["c_attn"])).save_pretrained(tmp_path / "adapter")
    gone = [f"{P}transformer.h.1.attn.c_attn.lora_{x}.weight" for x in "AB"]
    edit_adapter(lambda t: [t.pop(key) for key in gone])(tmp_path)
    assert merge(tmp_path) == 2
    assert "targets 1 modules" in (error := capsys.readouterr().err) and "transformer.h.1.attn.c_attn." in error
