"""Adapters travel between Flax models and real `peft` and `transformers` with the same logits.

Every case shows that the bound can fail: the base's own logits, a doubled alpha and a transposed B exceed it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "FlaxPreTrainedModel"):
    pytest.skip("transformers 5 has no Flax models", allow_module_level=True)

from safetensors.numpy import load_file, save_file  # noqa: E402

import lora_jax as lj  # noqa: E402
from lora_torch import config_for, load_peft, plan_peft, save_peft  # noqa: E402
from tests.interop import peft_models  # noqa: E402
from tests.interop.peft_models import (  # noqa: E402
    IDS,
    TOLERANCE,
    agree,
    logits,
    peft_logits,
    random_adapter,
    transformers_logits,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of their own deprecations

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TIED = {"lm_head.weight": "transformer.wte.weight"}

OURS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", dict(rank=4, alpha=7, target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"]), {}),
    "llama, ranks and alphas of their own": (
        "llama",
        dict(
            rank=4,
            alpha=8,
            target_modules=ATTENTION,
            # 16 makes k_proj's B square.
            rank_pattern={"k_proj": 16, "layers.1.self_attn.q_proj": 2},
            alpha_pattern={"layers.0.self_attn.v_proj": 3, "k_proj": 20},
        ),
        {},
    ),
    "llama, rsLoRA": ("llama", dict(rank=8, alpha=3.5, target_modules=["q_proj", "down_proj"], use_rslora=True), {}),
    "llama, embedding and head": ("llama", dict(rank=3, target_modules=["embed_tokens", "lm_head", "v_proj"]), {}),
    "gpt2": ("gpt2", dict(rank=4, target_modules=["c_attn", "c_proj", "c_fc"]), {}),
    "gpt2, DoRA": ("gpt2", dict(rank=4, target_modules=["c_attn", "c_fc"], use_dora=True), {}),
    "gpt2, tied embedding": ("gpt2", dict(rank=4, target_modules=["wte", "c_attn"]), dict(tied=TIED)),
    "gpt2, tied embedding trained in full": (
        "gpt2",
        dict(rank=4, target_modules=["c_attn"], modules_to_save=["wte"]),
        dict(tied=TIED),
    ),
    "bert": (
        "bert",
        dict(rank=4, target_modules=["query", "value", "word_embeddings"], modules_to_save=["classifier"]),
        dict(task_type="SEQ_CLS"),
    ),
}


@functools.cache
def twin(name: str) -> peft_models.Twin:
    return getattr(peft_models, name)()


def edited(directory: Path, change: Any) -> Path:
    """The same adapter with its configuration changed."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return directory


def double_alpha(config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 2
    config["alpha_pattern"] = {k: 2 * v for k, v in config.get("alpha_pattern", {}).items()}


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft_and_transformers(case: str, tmp_path: Path) -> None:
    name, settings, options = OURS[case]
    model = twin(name)
    plan = model.plan(lj.LoRAConfig(**settings))
    adapter = random_adapter(plan)
    want, base = model.ours(plan, adapter), model.base
    assert agree(logits(model.make()), base)

    directory = save_peft(adapter, tmp_path / "adapter", plan, names="hf-flax", **options)
    assert agree(peft_logits(model, directory), want)
    assert agree(transformers_logits(model, directory), want)
    tied = {k: v for k, v in options.items() if k == "tied"}
    back = load_peft(directory, plan_peft(directory, model.fn, model.params, jnp.asarray(IDS), **tied), **tied)
    assert back.sites == adapter.sites
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(back), strict=True))

    # The bound fails where it should.
    assert not agree(base, want)
    assert not agree(peft_logits(model, edited(directory, double_alpha)), want)


def test_dora_of_conv1d_is_merged_and_unmerged_as_in_peft(tmp_path: Path) -> None:
    """GPT-2's layers, which PEFT transposes for its norms."""
    model = twin("gpt2")
    plan = model.plan(lj.LoRAConfig(rank=4, target_modules=["c_attn", "c_fc"], use_dora=True))
    adapter = random_adapter(plan)
    theirs = peft.PeftModel.from_pretrained(
        model.make(), save_peft(adapter, tmp_path / "a", plan, names="hf-flax")
    ).base_model
    merged, norms = lj.merge(model.params, adapter), lj.weight_norms(model.params, adapter)
    theirs.merge_adapter()
    assert agree(logits(theirs), model.plain(merged)) and not agree(logits(theirs), model.base)
    theirs.unmerge_adapter()
    back = lj.unmerge(merged, adapter, norms)
    for site in plan.sites:
        layer = theirs.model.get_submodule(site.module)
        rest, first = (np.asarray(_leaf(tree, site.path)) for tree in (back, model.params))
        bound = TOLERANCE * np.abs(_leaf(merged, site.path)).max()
        assert np.abs(rest - first).max() <= bound < np.abs(np.asarray(_leaf(merged, site.path)) - first).max()
        # Flax stores GPT-2's kernels (out, in), PyTorch's Conv1D (in, out).
        assert np.abs(layer.base_layer.weight.detach().numpy().T - first).max() <= bound


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


STORED: dict[str, dict[str, Any]] = {
    "llama": dict(r=4, target_modules=["q_proj", "v_proj"]),
    "gpt2": dict(r=4, target_modules=["c_attn"]),
    "bert": dict(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("name", STORED)
def test_files_have_pefts_keys_and_shapes(name: str, tmp_path: Path) -> None:
    """What is stored is the same set of tensors that PEFT itself stores, no more and no less."""
    model, settings = twin(name), STORED[name]
    peft.get_peft_model(model.make(), peft.LoraConfig(**settings)).save_pretrained(tmp_path / "theirs")
    saved = dict(modules_to_save=["classifier"]) if name == "bert" else {}
    plan = model.plan(lj.LoRAConfig(rank=4, alpha=8, target_modules=settings["target_modules"], **saved))
    task = settings.get("task_type")
    save_peft(random_adapter(plan), tmp_path / "ours", plan, names="hf-flax", task_type=task)
    ours, theirs = (
        {key: (x.shape, x.dtype) for key, x in load_file(tmp_path / side / "adapter_model.safetensors").items()}
        for side in ("ours", "theirs")
    )
    assert ours == theirs and len(ours) == {"llama": 8, "gpt2": 4, "bert": 10}[name]
    mine, its = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    # PEFT writes sets, in any order, and GPT-2's `fan_in_fan_out` as it found it.
    for key in ("peft_type", "r", "lora_alpha", "bias", "fan_in_fan_out", "init_lora_weights", "inference_mode"):
        assert mine[key] == its[key], key
    assert set(mine["target_modules"]) == set(its["target_modules"]) and mine["task_type"] == its["task_type"]


def test_a_module_and_its_weight_are_one_target(tmp_path: Path) -> None:
    """The same factors under `target_modules` and under `target_parameters`: the same model, in PEFT and here."""
    model = twin("llama")
    plan = model.plan(lj.LoRAConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"]))
    adapter = random_adapter(plan)
    want = model.ours(plan, adapter)
    directory = save_peft(adapter, tmp_path / "a", plan, names="hf-flax")
    assert agree(peft_logits(model, directory), want)
    parameters = {"target_modules": [], "target_parameters": ["q_proj.weight", "v_proj.weight"]}
    edited(directory, lambda config: config.update(parameters))
    assert agree(peft_logits(model, directory), want) and not agree(model.base, want)
    again = plan_peft(directory, model.fn, model.params, jnp.asarray(IDS), names="hf-flax")
    assert {site.path for site in again.sites} == {site.path for site in plan.sites}
    assert agree(model.ours(again, load_peft(directory, again, names="hf-flax")), want)


def test_a_transposed_b_is_seen(tmp_path: Path) -> None:
    """k_proj's B is square at rank 16: transposing it changes no shape, and no loader notices."""
    model = twin("llama")
    plan = model.plan(lj.LoRAConfig(rank=16, target_modules=["k_proj"]))
    adapter = random_adapter(plan)
    directory = save_peft(adapter, tmp_path / "adapter", plan, names="hf-flax")
    tensors = load_file(directory / "adapter_model.safetensors")
    square = {k: np.ascontiguousarray(v.T) if "lora_B" in k else v for k, v in tensors.items()}
    want = model.ours(plan, adapter)
    assert agree(peft_logits(model, directory), want)
    save_file(square, directory / "adapter_model.safetensors")
    assert not agree(peft_logits(model, directory), want)


PEFTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", dict(r=4, lora_alpha=7, target_modules=[*ATTENTION, "down_proj"]), {}),
    "llama, patterns": (
        "llama",
        dict(
            r=4,
            target_modules=ATTENTION,
            rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 6},
            alpha_pattern={"model.layers.0.self_attn.v_proj": 3.5},
        ),
        {},
    ),
    "llama, rsLoRA and a layer filter": (
        "llama",
        dict(r=4, target_modules=["q_proj", "up_proj"], use_rslora=True, layers_to_transform=[1]),
        {},
    ),
    "llama, embedding": ("llama", dict(r=4, target_modules=["embed_tokens", "q_proj"]), dict(params=True)),
    "gpt2": ("gpt2", dict(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), {}),
    "gemma, tied embedding": (
        "gemma",
        dict(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        dict(params=True, tied={"lm_head.weight": "model.embed_tokens.weight"}),
    ),
    "gemma, tied embedding trained in full": (
        "gemma",
        dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        dict(tied={"lm_head.weight": "model.embed_tokens.weight"}),
    ),
    "bert": ("bert", dict(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"), {}),
}


@pytest.mark.parametrize("case", PEFTS)
def test_peft_in_ours(case: str, tmp_path: Path) -> None:
    name, settings, options = PEFTS[case]
    model = twin(name)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model.make(), peft.LoraConfig(**settings, init_lora_weights=False))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    want, base = logits(theirs), model.base

    tied = {k: v for k, v in options.items() if k == "tied"}
    params = model.params if options.get("params") else None
    plan = plan_peft(tmp_path, model.fn, model.params, jnp.asarray(IDS), names="hf-flax", **tied)
    adapter = load_peft(tmp_path, plan, names="hf-flax", params=params, **tied)
    assert agree(model.ours(plan, adapter), want)
    assert not agree(base, want)
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    assert not agree(model.ours(plan, doubled), want)

    assert model.plan(config_for(tmp_path)).sites == plan.sites


def test_sites_take_what_the_file_says_and_a_plan_does_not(tmp_path: Path) -> None:
    """`apply` computes with the plan's scale, so a plan must agree; for a merge the sites take the file's."""
    model = twin("llama")
    settings = dict(r=4, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 2}, use_rslora=True)
    theirs = peft.get_peft_model(model.make(), peft.LoraConfig(**settings, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    plan = model.plan(lj.LoRAConfig(rank=1, alpha=1, target_modules=["q_proj", "k_proj"]))
    loose = load_peft(tmp_path, plan.sites)
    assert {(s.path[-2], s.rank, s.alpha, s.rslora) for s in loose.sites} == {
        ("q_proj", 4, 8.0, True),
        ("k_proj", 2, 8.0, True),
    }
    want = logits(theirs)
    assert agree(model.plain(lj.merge(model.params, loose)), want)
    assert not agree(model.base, want)
    with pytest.raises(ValueError, match="q_proj.kernel`: the file has rank 4, alpha 8 with rsLoRA, the plan rank 1, "):
        load_peft(tmp_path, plan)


def test_a_lookup_only_adapter_of_a_tied_table_is_refused(tmp_path: Path) -> None:
    """PEFT adapts GPT-2's `wte` and leaves the head alone: one table here cannot be both."""
    model = twin("gpt2")
    config = peft.LoraConfig(r=4, target_modules=["wte"], init_lora_weights=False)
    peft.get_peft_model(model.make(), config).save_pretrained(tmp_path)
    plan = model.plan(lj.LoRAConfig(rank=4, alpha=8, target_modules=["wte"]))
    with pytest.raises(ValueError, match="missing: base_model.model.lm_head.*the same table"):
        load_peft(tmp_path, plan, tied=TIED)
    with pytest.raises(ValueError, match="tied={'lm_head.weight': 'transformer.wte.weight'}"):
        load_peft(tmp_path, plan)
    with pytest.raises(ValueError, match="is also the model's output head"):
        save_peft(random_adapter(plan), tmp_path / "other", plan)

    both = peft.LoraConfig(r=4, target_modules=["wte", "lm_head"], init_lora_weights=False)
    peft.get_peft_model(model.make(), both).save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="adapts them differently"):
        load_peft(tmp_path / "both", plan, tied=TIED)


def test_a_head_only_adapter_of_a_tied_table_is_refused(tmp_path: Path) -> None:
    model = twin("gpt2")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "lm_head"], init_lora_weights=False)
    peft.get_peft_model(model.make(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm_head is not in the plan: it is transformer.wte.weight here, and what cha"):
        plan_peft(tmp_path, model.fn, model.params, jnp.asarray(IDS), names="hf-flax", tied=TIED)


def test_a_copy_of_one_side_of_a_tied_table_is_refused(tmp_path: Path) -> None:
    """PEFT trains a copy of GPT-2's `wte` for the lookup and leaves the head at the base's table."""
    model = twin("gpt2")
    settings = dict(r=4, target_modules=["c_attn"], init_lora_weights=False)
    one = peft.get_peft_model(model.make(), peft.LoraConfig(**settings, modules_to_save=["wte"]))
    one.save_pretrained(tmp_path / "one")
    ids = jnp.asarray(IDS)
    with pytest.raises(ValueError, match="missing: base_model.model.lm_head.weight.*the lookup alone"):
        plan_peft(tmp_path / "one", model.fn, model.params, ids, names="hf-flax", tied=TIED)
    with pytest.raises(ValueError, match="tied={'lm_head.weight': 'transformer.wte.weight'}"):
        plan_peft(tmp_path / "one", model.fn, model.params, ids, names="hf-flax")

    both = peft.get_peft_model(model.make(), peft.LoraConfig(**settings, modules_to_save=["wte", "lm_head"]))
    with torch.no_grad():
        both.base_model.model.lm_head.modules_to_save.default.weight += 1
    both.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="lm_head.weight and transformer.wte.weight are one weight here, but the file"):
        plan_peft(tmp_path / "both", model.fn, model.params, ids, names="hf-flax", tied=TIED)

    plan = model.plan(lj.LoRAConfig(rank=4, target_modules=["c_attn"], modules_to_save=["wte"]))
    with pytest.raises(ValueError, match="which its copy changes as well: say the head's name"):
        save_peft(random_adapter(plan), tmp_path / "ours", plan, names="hf-flax")


def test_a_table_of_several_lookups_is_refused(tmp_path: Path) -> None:
    """T5's `shared` is the table of two more lookups, which PEFT's wrapper of `shared` does not reach."""
    model = twin("gpt2")
    tied = {**TIED, "decoder.embed_tokens.weight": "transformer.wte.weight"}
    for settings in (dict(target_modules=["wte"]), dict(target_modules=["c_attn"], modules_to_save=["wte"])):
        plan = model.plan(lj.LoRAConfig(rank=4, **settings))
        with pytest.raises(ValueError, match="is also called lm_head.weight, decoder.embed_tokens.weight: PEFT adapts"):
            save_peft(random_adapter(plan), tmp_path / "ours", plan, names="hf-flax", tied=tied)


def test_patterns_of_a_weight_targeted_as_a_parameter(tmp_path: Path) -> None:
    """PEFT matches them with `q_proj.weight` then: one that ends in `q_proj` does not count."""
    model = twin("llama")
    settings = dict(target_modules=["v_proj"], target_parameters=["q_proj.weight"], init_lora_weights=False)
    patterns = dict(rank_pattern={"q_proj.weight": 6}, alpha_pattern={"q_proj": 30, "v_proj": 5})
    theirs = peft.get_peft_model(model.make(), peft.LoraConfig(r=4, **settings, **patterns))
    theirs.save_pretrained(tmp_path)
    plan = plan_peft(tmp_path, model.fn, model.params, jnp.asarray(IDS), names="hf-flax")
    assert {(s.path[-2], s.rank, s.alpha) for s in plan.sites} == {("q_proj", 6, 8.0), ("v_proj", 4, 5.0)}
    want = logits(theirs)
    assert agree(model.ours(plan, load_peft(tmp_path, plan, names="hf-flax")), want)
    assert not agree(model.base, want)


def test_copies_are_of_whole_modules_and_none_inside_another(tmp_path: Path) -> None:
    """PEFT would copy a module named twice over twice, drop factors inside a copy, and miss what a copy lacks."""
    model = twin("bert")

    def save(**settings: Any) -> Path:
        plan = model.plan(lj.LoRAConfig(rank=4, **settings))
        return save_peft(random_adapter(plan), tmp_path / str(settings), plan, names="hf-flax")

    with pytest.raises(ValueError, match=r"`bert.pooler.dense` is copied as a whole, but only a part"):
        save(target_modules=["query"], modules_to_save=["pooler.dense.kernel"])
    # A bias alone is what PEFT's `bias` trains.
    for name, said in (("query.bias", "lora_only"), ("pooler.dense.bias", "all")):
        config = json.loads(
            (save(target_modules=["query"], modules_to_save=[name]) / "adapter_config.json").read_text()
        )
        assert config["bias"] == said and "modules_to_save" not in config
    # PEFT cannot load what it writes for this, so nothing says which of the two copies is meant.
    both = peft.LoraConfig(target_modules=["query"], modules_to_save=["pooler", "pooler.dense"])
    peft.get_peft_model(model.make(), both).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="names bert.pooler and bert.pooler.dense in it"):
        config_for(tmp_path / "theirs")
    # `dense` is inside `output`, which stands inside nothing that is copied.
    plan = model.plan(lj.LoRAConfig(rank=4, target_modules=["query"], modules_to_save=["output", "output.dense"]))
    adapter = random_adapter(plan)
    directory = save_peft(adapter, tmp_path / "nested", plan, names="hf-flax")
    assert agree(peft_logits(model, directory), model.ours(plan, adapter))
    assert not agree(model.base, model.ours(plan, adapter))
