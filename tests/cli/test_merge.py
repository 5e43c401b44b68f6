"""`lora-jax merge` against real peft: the merged directory, loaded by transformers, is the adapted model."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_jax.cli import main
from lora_jax.cli._shards import parse_size

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LOGITS = 1e-5  # float32 logits of order one; a dropped or half-scaled adapter moves them by 1e-2 and more
WORDS = 48
# peft says so whenever it meets a Conv1D, a tied table or a modules_to_save, which is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(tie=False):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tie,
        )
    )


def gpt2(kind="GPT2LMHeadModel"):
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return getattr(transformers, kind)(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def outputs(model):
    model.eval()
    ids = torch.arange(24).reshape(2, 12) * 7 % WORDS
    image = torch.sin(torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16) / 9.0)
    with torch.no_grad():
        out = model(image if model.config.model_type == "vit" else ids)
    return (out.logits if "logits" in out else out.last_hidden_state).float().numpy()


def spread(model):
    """Spreads the parameters, so that norms, biases and positions take part in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_pair(tmp_path, model, config, shard="5GB"):
    """A base directory and a random adapter of it. **Returns:** the logits (adapted, base)."""
    spread(model).save_pretrained(tmp_path / "base", max_shard_size=shard)
    base = outputs(model)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                # peft draws an embedding's factors ten times larger than the others'.
                parameter.mul_(0.1 if "lora_embedding" in name else 1.0)
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    want = outputs(adapted)
    assert np.abs(want - base).max() > 1e-2  # a dropped adapter would be noticed
    return want, base


def merge(tmp_path, *options):
    return main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out")), *options])


def load(tmp_path, kind, **options):
    """Loads the merged model, and allows no missing or unexpected key."""
    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R4 = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
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


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sharded base and an adapter, to be copied and spoilt."""
    path = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    config = peft.LoraConfig(**R4, target_modules=["q_proj", "v_proj"])
    save_pair(path, llama(), config, "20KB")
    return path


P = "base_model.model."
Q1 = P + "model.layers.1.self_attn.q_proj"
ADAPTER = "adapter/adapter_model.safetensors"


def _truncate(name):
    def change(d):
        path = next(d.glob(name))
        path.write_bytes(path.read_bytes()[:-7])

    return change


def _json(name, **changes):
    def change(d):
        values = json.loads((d / name).read_text())
        (d / name).write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v is not ...}))

    return change


def _tensors(name, edit):
    def change(d):
        path = next(d.glob(name))
        tensors = load_file(path)
        edit(tensors)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata={"format": "pt"})

    return change


def _adapter(edit):
    return _tensors(ADAPTER, edit)


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
    _tensors(f"base/{index['weight_map'][name]}", lambda t: t.pop(name))(d)
    _in_index(d, lambda m: m.pop(name))


def _integer_base(d):
    name = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((d / "base" / "model.safetensors.index.json").read_text())
    _tensors(f"base/{index['weight_map'][name]}", lambda t: t.update({name: t[name].astype(np.int8)}))(d)


def _eighth_precision_base(d):
    name = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((d / "base" / "model.safetensors.index.json").read_text())
    kind = ml_dtypes.float8_e4m3fn
    _tensors(f"base/{index['weight_map'][name]}", lambda t: t.update({name: t[name].astype(kind)}))(d)


BAD = {
    "truncated adapter": (_truncate(ADAPTER), "damaged"),
    "truncated shard": (_truncate("base/model-00003-*.safetensors"), "damaged"),
    "unknown key": (
        _adapter(lambda t: t.update({P + "model.layers.0.x": np.ones(3)})),
        "0.x (3,) would overwrite",
    ),
    "stray base tensor": (
        _adapter(lambda t: t.update({P + "lm_head.weight": np.ones((48, 32))})),
        "(48, 32) would",
    ),
    "no B": (_adapter(lambda t: t.pop(Q1 + ".lora_B.weight")), "no lora_B"),
    "module without factors": (
        _adapter(lambda t: [t.pop(f"{Q1}.lora_{x}.weight") for x in "AB"]),
        "model.layers.1.self_attn.q_proj. If that is meant so, pass --partial",
    ),
    "wrong in": (
        _adapter(lambda t: t.update({Q1 + ".lora_A.weight": np.ones((4, 31), np.float32)})),
        "is (32, 32) in the base, but A (4, 31) and B (32, 4) make (32, 31)",
    ),
    "transposed": (_adapter(lambda t: t.update({Q1 + ".lora_A.weight": t[Q1 + ".lora_A.weight"].T})), "on a rank"),
    "NaN, met in a later shard": (_adapter(_nan), "not finite"),
    "unknown layer": (
        _adapter(
            lambda t: [
                t.update({f"{P}model.layers.9.self_attn.q_proj.lora_{x}.weight": t[f"{Q1}.lora_{x}.weight"]})
                for x in "AB"
            ]
        ),
        "the base lacks 1 of the 5 tensors",
    ),
    "another adapter": (_json("adapter/adapter_config.json", peft_type="IA3"), "'IA3'"),
    "pissa": (
        _json("adapter/adapter_config.json", init_lora_weights="pissa"),
        "path_initial_model_for_weight_conversion",
    ),
    "alora": (_json("adapter/adapter_config.json", alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "qalora": (
        _json("adapter/adapter_config.json", use_qalora=True),
        "`use_qalora=True` is not supported here; `lora_torch.load_peft` reads it",
    ),
    "replication": (_json("adapter/adapter_config.json", layer_replication=[[0, 2]]), "layer_replication"),
    "a key from the future": (_json("adapter/adapter_config.json", use_magic=True), "use_magic=True"),
    "quantised": (_json("base/config.json", quantization_config={"bits": 4}), "quantised"),
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
    _json("adapter/adapter_config.json", trainable_token_indices=moved)(tmp_path)
    assert merge(tmp_path) == 0
    assert np.abs(outputs(load(tmp_path, type(model))) - want).max() > 100 * LOGITS


def whole(directory):
    """The tensors of all shards."""
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


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
        _json("adapter/adapter_config.json", trainable_token_indices=rows)(tmp_path)
        assert merge(tmp_path) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
    # The same rows from two sides: a copy of the tied head, and one of the table.
    table, plain = whole(tmp_path / "base")["model.embed_tokens.weight"], tmp_path / "plain"
    shutil.copytree(tmp_path / "adapter", plain)
    for module, tied in (("lm_head", True), ("model.embed_tokens", False)):
        shutil.rmtree(tmp_path / "adapter")
        shutil.copytree(plain, tmp_path / "adapter")
        _json("base/config.json", tie_word_embeddings=tied)(tmp_path)
        saved = dict(modules_to_save=[module.split(".")[-1]], trainable_token_indices=[1, 2])
        _json("adapter/adapter_config.json", **saved)(tmp_path)
        _adapter(lambda t, m=module: t.update({f"base_model.model.{m}.weight": table}))(tmp_path)
        assert merge(tmp_path) == 2
        assert "two values for one row" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_float16_overflow_is_refused(tmp_path, capsys):
    torch.manual_seed(0)
    save_pair(tmp_path, llama().half(), peft.LoraConfig(**R4, target_modules=["q_proj"]))
    _adapter(lambda t: t.update({Q1 + ".lora_B.weight": 1e7 * t[Q1 + ".lora_B.weight"]}))(tmp_path)
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
    _adapter(lambda t: [t.pop(key) for key in gone])(tmp_path)
    assert merge(tmp_path) == 2
    assert "targets 1 modules" in (error := capsys.readouterr().err) and "transformer.h.1.attn.c_attn." in error
