"""`lora-jax merge` against real peft: the merged directory, loaded by transformers, is the adapted model."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from lora_jax.cli import main
from lora_jax.cli._shards import parse_size
from tests.cli.merge_models import (
    LOGITS,
    R4,
    bert,
    edit_adapter,
    edit_json,
    gpt2,
    llama,
    load,
    merge,
    outputs,
    save_pair,
    spread,
    vit,
    whole,
)
from tests.cli.merge_models import one_thread as one_thread  # fixtures

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# peft says so whenever it meets a Conv1D, a tied table or a modules_to_save, which is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama": (llama, dict(target_modules=LINEARS)),
    "llama patterns": (
        llama,
        dict(
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 7, "down_proj": 2},
            alpha_pattern={"v_proj": 3.5},
            use_rslora=True,
        ),
    ),
    "llama some layers": (llama, dict(target_modules=["q_proj", "k_proj"], layers_to_transform=[1])),
    "llama excluded": (llama, dict(target_modules=r".*_proj", exclude_modules=["down_proj"])),
    "llama vocabulary": (llama, dict(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "llama saved": (llama, dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "llama all-linear": (llama, dict(target_modules="all-linear")),
    "gpt2": (gpt2, dict(target_modules=["c_attn", "c_proj", "wpe"])),
    "gpt2 biases": (gpt2, dict(target_modules=["c_attn", "c_proj"], bias="all")),
    "gpt2 lora_bias": (gpt2, dict(target_modules=["c_attn", "c_fc"], lora_bias=True)),
    "bert": (bert, dict(target_modules=["query", "value", "word_embeddings"], task_type="SEQ_CLS")),
    "bert biases": (
        bert,
        dict(
            target_modules=["query", "dense"], task_type="SEQ_CLS", bias="lora_only", exclude_modules=["pooler.dense"]
        ),
    ),
    "gpt2 dora": (gpt2, dict(target_modules=["c_attn", "c_proj", "wpe"], use_dora=True)),
    "vit dora": (vit, dict(target_modules=["projection", "query"], use_dora=True, modules_to_save=["classifier"])),
    "vit": (vit, dict(target_modules=["projection", "query"], modules_to_save=["classifier"])),
}


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(tmp_path, case, shard):
    torch.manual_seed(0)
    make, options = CASES[case]
    model = make()
    kind = type(model)
    want, base = save_pair(tmp_path, model, peft.LoraConfig(**R4 | options), shard)
    before = {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    assert merge(tmp_path) == 0
    assert np.abs(outputs(load(tmp_path, kind)) - want).max() <= LOGITS
    # The base is as it was; the result has its layout, and its other files byte for byte.
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(before)
    assert (len(before) > 4) == (shard == "20KB")
    for name, content in before.items():
        if name.endswith(".index.json"):
            assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(content)
        elif name.endswith(".safetensors"):
            with safe_open(tmp_path / "out" / name, framework="np") as file:
                assert file.metadata() == {"format": "pt"}
        else:
            assert (tmp_path / "out" / name).read_bytes() == content


def test_half_the_alpha_would_fail(tmp_path):
    """The bound of the test above separates a right scale from a wrong one."""
    torch.manual_seed(0)
    want, _ = save_pair(tmp_path, llama(), peft.LoraConfig(**R4, target_modules=LINEARS))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 3}))
    assert merge(tmp_path) == 0
    assert np.abs(outputs(load(tmp_path, transformers.LlamaForCausalLM)) - want).max() > 100 * LOGITS


def test_reshards(tmp_path, capsys):
    torch.manual_seed(0)
    want, _ = save_pair(tmp_path, llama(), peft.LoraConfig(**R4, target_modules=LINEARS), "20KB")
    for name, size, fewest, most in (("a", "12KB", 5, 20), ("b", "1GB", 1, 1)):
        words = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / name)]
        assert main([*words, "--max-shard-size", size]) == 0
        files = sorted((tmp_path / name).glob("*.safetensors"))
        assert fewest <= len(files) <= most
        # Larger than the limit only where one tensor is.
        for file in files:
            tensors = load_file(file)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= parse_size(size)
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name)
        assert np.abs(outputs(model) - want).max() <= LOGITS
    assert not (tmp_path / "b" / "model.safetensors.index.json").exists()
    assert merge(tmp_path, "--max_shard_size", "lots") == 2
    assert "not a size" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype, rows", [("bfloat16", 512), ("float16", 512), ("bfloat16", 7)])
def test_half_precision_is_rounded_once(tmp_path, monkeypatch, dtype, rows):
    monkeypatch.setattr("lora_jax.cli._edits.ROWS", rows)  # 7: several uneven blocks in a small matrix
    torch.manual_seed(0)
    model = llama().to(getattr(torch, dtype))
    save_pair(tmp_path, model, peft.LoraConfig(**R4, target_modules=["q_proj", "down_proj"]))
    assert merge(tmp_path) == 0
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kind = np.dtype(getattr(ml_dtypes, dtype, np.float16))
    for name, value in merged.items():
        assert value.dtype == base[name].dtype == kind
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in factors:
            assert value.tobytes() == base[name].tobytes()
            continue
        b, a = (factors[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "BA")
        exact = base[name].astype(np.float64) + 1.5 * (b @ a)
        # Half a unit in the last place, plus the float32 arithmetic before it.
        unit = float(ml_dtypes.finfo(kind).eps) * 2.0 ** np.floor(np.log2(np.abs(exact)))
        bound = 0.5 * unit + 1e-6

        def worst(got, exact=exact, bound=bound):
            return np.max(np.abs(got.astype(np.float64) - exact) / bound)

        assert worst(value) <= 1
        # Adding in the base's dtype, as a naive merge would, is told apart.
        assert worst(base[name] + (1.5 * (b @ a)).astype(kind)) > 1


def test_checkpoint_without_the_models_prefix(tmp_path):
    """The Hub's gpt2 stores `h.0...`; the adapter of a GPT2LMHeadModel says `transformer.h.0...`."""
    torch.manual_seed(0)
    spread(gpt2("GPT2Model")).save_pretrained(tmp_path / "plain")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "plain")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**R4, target_modules=["c_attn", "c_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    want = outputs(adapted)
    (tmp_path / "plain").rename(tmp_path / "base")
    assert merge(tmp_path) == 0
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert np.abs(outputs(merged) - want).max() <= LOGITS
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_checkpoint_with_one_more_prefix(tmp_path):
    """The adapter of a bare BertModel says `encoder...`; the checkpoint has a head and says `bert.encoder...`."""
    torch.manual_seed(0)
    spread(bert()).save_pretrained(tmp_path / "base")
    model = transformers.BertModel.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**R4, target_modules=["query", "dense"]))
    adapted.save_pretrained(tmp_path / "adapter")
    want = outputs(adapted)
    assert merge(tmp_path) == 0
    merged = transformers.BertModel.from_pretrained(tmp_path / "out")
    assert np.abs(outputs(merged) - want).max() <= LOGITS
    assert "classifier.weight" in load_file(tmp_path / "out" / "model.safetensors")


TIED = {
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "head": dict(target_modules=["lm_head", "q_proj"]),
    "both": dict(target_modules=["embed_tokens", "lm_head"]),
    "saved embedding": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "saved head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_table_is_refused_or_untied(tmp_path, capsys, case):
    torch.manual_seed(0)
    want, _ = save_pair(tmp_path, llama(tie=True), peft.LoraConfig(**R4, **TIED[case]), "20KB")
    assert merge(tmp_path) == 2
    assert "--untie" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert merge(tmp_path, "--untie") == 0
    merged = load(tmp_path, transformers.LlamaForCausalLM)
    assert merged.config.tie_word_embeddings is False
    assert np.abs(outputs(merged) - want).max() <= LOGITS
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nelement() * 4 for p in merged.parameters())


def test_a_tied_table_of_gpt2(tmp_path, capsys):
    """config.json of a GPT-2 does not say that it ties: the class does."""
    torch.manual_seed(0)
    want, _ = save_pair(tmp_path, gpt2(), peft.LoraConfig(**R4, target_modules=["wte", "c_attn"]))
    assert "tie_word_embeddings" not in json.loads((tmp_path / "base" / "config.json").read_text())
    assert merge(tmp_path) == 2
    assert "transformer.wte.weight" in capsys.readouterr().err
    assert merge(tmp_path, "--untie") == 0
    assert np.abs(outputs(load(tmp_path, transformers.GPT2LMHeadModel)) - want).max() <= LOGITS


@pytest.mark.parametrize("saved", [False, True], ids=["factors", "full"])
def test_an_equal_change_to_both_sides_stays_tied(tmp_path, saved):
    torch.manual_seed(0)
    if saved:
        options = dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    else:
        options = dict(target_modules=["embed_tokens", "lm_head", "q_proj"])
    config = peft.LoraConfig(**R4, **options, ensure_weight_tying=True)
    want, _ = save_pair(tmp_path, llama(tie=True), config)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lm_head" in key for key in stored) and any("embed_tokens" in key for key in stored)
    assert merge(tmp_path) == 0
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(
        load_file(tmp_path / "base" / "model.safetensors")
    )
    merged = load(tmp_path, transformers.LlamaForCausalLM)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert np.abs(outputs(merged) - want).max() <= LOGITS


def test_what_is_copied(tmp_path):
    torch.manual_seed(0)
    save_pair(tmp_path, llama(), peft.LoraConfig(**R4, target_modules=["q_proj"]))
    base = tmp_path / "base"
    for name in ("tokenizer.json", "LICENSE", "modeling_x.py", "1_Pooling/config.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    for name in ("pytorch_model.bin", "README.md", "model.onnx", "pytorch_model.bin.index.json", "onnx/a.onnx"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("stale weights, or their description")
    # As in the Hub's cache: a link to a file elsewhere.
    shutil.move(base / "model.safetensors", tmp_path / "blob")
    (base / "model.safetensors").symlink_to(tmp_path / "blob")
    assert merge(tmp_path) == 0
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "LICENSE",
        "modeling_x.py",
        "1_Pooling/config.json",
    }
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


TOKEN_ROWS = {
    "llama": (llama, [47, 7, 0]),
    "llama tied": (lambda: llama(tie=True), {"embed_tokens": [7, 12]}),
    "gpt2, which ties": (gpt2, {"wte": [7, 1]}),
}


@pytest.mark.parametrize("case", TOKEN_ROWS)
def test_token_rows(tmp_path, case):
    """They replace rows of the table, and with it of a head that is tied to it."""
    torch.manual_seed(0)
    make, rows = TOKEN_ROWS[case]
    target = "c_attn" if "gpt2" in case else "q_proj"
    config = peft.LoraConfig(**R4, trainable_token_indices=rows, target_modules=[target])
    model = make()
    want, _ = save_pair(tmp_path, model, config, "20KB")
    assert merge(tmp_path) == 0
    assert np.abs(outputs(load(tmp_path, type(model))) - want).max() <= LOGITS
    table = "transformer.wte.weight" if "gpt2" in case else "model.embed_tokens.weight"
    base, out = (whole(tmp_path / name)[table] for name in ("base", "out"))
    changed = sorted(rows if isinstance(rows, list) else next(iter(rows.values())))
    assert list(np.flatnonzero((base != out).any(1))) == changed

    # A wrong row would not go unnoticed, and one that the base does not have is told.
    shutil.rmtree(tmp_path / "out")
    moved = [changed[0] + 1, *changed[1:]] if isinstance(rows, list) else {k: [3, v[1]] for k, v in rows.items()}
    edit_json("adapter/adapter_config.json", trainable_token_indices=moved)(tmp_path)
    assert merge(tmp_path) == 0
    assert np.abs(outputs(load(tmp_path, type(model))) - want).max() > 100 * LOGITS


def test_token_rows_that_do_not_fit(tmp_path, capsys):
    torch.manual_seed(0)
    config = peft.LoraConfig(**R4, trainable_token_indices=[1, 2], target_modules=["q_proj"])
    save_pair(tmp_path, llama(), config)
    for rows, told in (
        ([1, 48], "has 48 rows in the base, and the adapter trains row 48"),
        ([1, 10**30], "trains row 1000000000"),
        ([1], "is (2, 32), for the 1 rows"),
        ([1, 1], "trains a row twice, [1, 1]"),
    ):
        edit_json("adapter/adapter_config.json", trainable_token_indices=rows)(tmp_path)
        assert merge(tmp_path) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
    # The same rows from two sides: a copy of the tied head, and one of the table.
    table, plain = whole(tmp_path / "base")["model.embed_tokens.weight"], tmp_path / "plain"
    shutil.copytree(tmp_path / "adapter", plain)
    for module, tied in (("lm_head", True), ("model.embed_tokens", False)):
        shutil.rmtree(tmp_path / "adapter")
        shutil.copytree(plain, tmp_path / "adapter")
        edit_json("base/config.json", tie_word_embeddings=tied)(tmp_path)
        saved = dict(modules_to_save=[module.split(".")[-1]], trainable_token_indices=[1, 2])
        edit_json("adapter/adapter_config.json", **saved)(tmp_path)
        edit_adapter(lambda t, m=module: t.update({f"base_model.model.{m}.weight": table}))(tmp_path)
        assert merge(tmp_path) == 2
        assert "two values for one row" in capsys.readouterr().err and not (tmp_path / "out").exists()
