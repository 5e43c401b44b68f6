"""What vLLM and llama.cpp can read: profiles that need no scale, and the reasons for refusing the rest.

Neither runs here. Their arithmetic, as their converters and loaders do it, is a few lines of numpy below; the files
are also loaded by real `peft`, which must give the same logits as the adapter they came from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax import reference
from lora_jax.peft_matching import is_target
from lora_torch import Naming, read_peft, save_peft, target_names
from lora_torch.peft_export import shortest_names
from tests.interop.peft_models import random_adapter

PARAMS = {f"layers_{i}": {p: {"kernel": jnp.ones((4, 6))} for p in ("q", "v")} for i in range(2)}
X = jnp.ones((3, 4))
P = "base_model.model."


def fn(params: Any, x: Any) -> Any:
    return sum(x @ layer[p]["kernel"] for layer in params.values() for p in ("q", "v"))


def plan_of(**settings: Any) -> lj.Plan:
    return lj.plan(fn, PARAMS, X, config=lj.LoRAConfig(**{"target_modules": ["q", "v"], **settings}))


MIXED = dict(
    rank=3,
    alpha=5,
    rank_pattern={"layers.1.v": 7},
    alpha_pattern={"layers.0.q": 2.5},
    use_rslora=True,
)


def reader_deltas(directory: Path, target: str) -> dict[str, np.ndarray]:
    """W's change per module, in float64, by the consumer's own rule."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    out = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
            # llama.cpp: one alpha, over the rank of this B. vLLM: one alpha over one r, patterns not looked at.
            scale = config["lora_alpha"] / (b.shape[1] if target == "gguf" else config["r"])
            out[key.removeprefix(P).removesuffix(".lora_A.weight")] = scale * b @ a.astype(np.float64)
    return out


@pytest.mark.parametrize("target", ["vllm", "gguf"])
def test_readers_that_know_one_scale_only(target: str, tmp_path: Path) -> None:
    plan = plan_of(**MIXED)
    adapter = random_adapter(plan)
    directory = save_peft(adapter, tmp_path / "a", plan, target=target)
    config, tensors = read_peft(directory)
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert not {"use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"} & set(config)
    assert {v.shape for v in tensors.values()} == {(7, 4), (6, 7)}

    plain = save_peft(adapter, tmp_path / "plain", plan)
    got, naive = reader_deltas(directory, target), reader_deltas(plain, target)
    wrong = 0
    for site in plan.sites:
        (name,) = target_names(plan)[site.name]
        a, b = (np.asarray(x, np.float64) for x in adapter.factors(site))
        want, magnitude = site.scale * (a @ b).T, site.scale * (abs(a) @ abs(b)).T
        bound = reference.tolerance(np.float32, site.rank) * magnitude
        assert reference.excess(got[name], want, bound) <= 1
        wrong += reference.excess(naive[name], want, bound) > 1
    assert wrong == len(plan.sites)  # the plain export is wrong there, which is why there are profiles


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    plan = plan_of(rank=4, alpha=7, dtype="bfloat16")
    adapter = random_adapter(plan)
    _, tensors = read_peft(save_peft(adapter, tmp_path / "a", plan, target="vllm"))
    _, b = (np.asarray(x) for x in adapter.factors(plan.sites[0]))
    got = tensors[f"{P}layers.0.q.lora_B.weight"]
    assert got.dtype == b.dtype and np.array_equal(got, (b.T.astype(np.float64) * 7 / 4).astype(b.dtype))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["vllm", "gguf"])
def test_peft_gives_the_same_logits(target: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxPreTrainedModel"):
        pytest.skip("transformers 5 has no Flax models")
    from tests.interop.peft_models import agree, llama, peft_logits

    model = llama()
    plan = model.plan(
        lj.LoRAConfig(**{**MIXED, "rank_pattern": {"k_proj": 7}, "alpha_pattern": {"1.self_attn.q_proj": 1.5}},
                      target_modules=["q_proj", "k_proj", "embed_tokens", "lm_head"])
    )  # fmt: skip
    adapter = random_adapter(plan)
    directory = save_peft(adapter, tmp_path / "a", plan, target=target, names="hf-flax")
    want = model.ours(plan, adapter)
    assert agree(peft_logits(model, directory), want)
    assert not agree(model.base, want)
    halved = jax.tree.map(lambda x: x / 2, adapter)
    save_peft(halved, directory, plan, target=target, names="hf-flax", overwrite=True)
    assert not agree(peft_logits(model, directory), want)


def refusing_model() -> tuple[lj.Plan, Naming, dict[str, str]]:
    params = {
        "embed": {"embedding": jnp.ones((9, 4))},
        "conv": {"kernel": jnp.ones((3, 4, 4))},
        "c_attn": {"kernel": jnp.ones((4, 4))},
        "experts": {"up": jnp.ones((2, 4, 4))},
        "score": {"kernel": jnp.ones((4, 3))},
    }

    def model(p: Any, ids: Any) -> Any:
        x = p["embed"]["embedding"][ids]
        x = jax.lax.conv_general_dilated(x, p["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
        x = x @ p["c_attn"]["kernel"].T
        x = jnp.einsum("ebd,edf->ebf", x, p["experts"]["up"])
        return x @ p["score"]["kernel"], x @ p["embed"]["embedding"].T

    config = lj.LoRAConfig(rank=2, target_modules=["embed", "conv", "c_attn", "experts"], modules_to_save=["score"])
    plan = lj.plan(model, params, jnp.zeros((2, 5), jnp.int32), config=config)
    # The torch layer of c_attn stores (in, out), as GPT-2's.
    naming = Naming(preset="linen", layouts={"c_attn.kernel": "linear"})
    return plan, naming, {"lm_head.weight": "embed.weight"}


@pytest.mark.parametrize("target", ["vllm", "gguf"])
def test_everything_a_reader_cannot_take_is_in_one_error(target: str, tmp_path: Path) -> None:
    plan, naming, tied = refusing_model()
    adapter = random_adapter(plan)
    config, _ = read_peft(save_peft(adapter, tmp_path / "peft", plan, names=naming, tied=tied))
    assert config["modules_to_save"] == ["score"] and config["target_parameters"] == ["experts.up"]
    assert config["target_modules"] == ["c_attn", "conv", "embed", "lm_head"]
    assert not config["fan_in_fan_out"]  # PEFT refuses it beside target_parameters
    with pytest.raises(ValueError) as error:
        save_peft(adapter, tmp_path / "a", plan, target=target, names=naming, tied=tied)  # type: ignore[arg-type]
    text = str(error.value)
    for part in (
        "score: {} takes no modules trained in full",
        "conv: {} takes 2-D factors only",
        "experts.up: {} does not read adapters of raw parameters",
        "lm_head: {} takes no adapter for a head tied to the embedding",
    ):
        assert part.format("vLLM" if target == "vllm" else "llama.cpp's convert_lora_to_gguf.py") in text
    assert ("llama.cpp transposes the factors of GPT-2's Conv1D" in text) == (target == "gguf")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="`target='onnx'` is unknown"):
        save_peft(adapter, tmp_path / "a", plan, target="onnx", names=naming, tied=tied)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "others", "want"),
    [
        (["h.0.q", "h.1.q", "h.0.v", "h.1.v"], ["h.0.k", "embed"], ["q", "v"]),
        (["enc.0.q", "enc.1.q"], ["dec.0.q"], ["enc.0.q", "enc.1.q"]),
        (["enc.0.a.q", "enc.1.a.q"], ["enc.0.b.q", "q"], ["a.q"]),
        (["h.0.out"], ["h.1.out"], ["h.0.out"]),
        (["net.0", "net.2"], ["net.4"], ["net.0", "net.2"]),
        (["mlp", "h.0.fc"], ["h.0.mlp.up"], r"h\.0\.fc|mlp"),
        (["h.0.mlp"], ["mlp.up"], ["h.0.mlp"]),
    ],
)
def test_targets_are_the_shortest_names_that_hit_nothing_else(names: Any, others: Any, want: Any) -> None:
    got = shortest_names(names, others)
    assert got == want
    containers = {"h.0.mlp", "h.0", "h"} if "h.0.mlp.up" in others else set()
    for module in [*names, *others, *containers]:
        assert is_target({"target_modules": got}, module) == (module in names), module


def test_without_a_plan_targets_are_full_names(tmp_path: Path) -> None:
    plan = plan_of(rank=2)
    adapter = random_adapter(plan)
    config, _ = read_peft(save_peft(adapter, tmp_path / "a"))
    assert config["target_modules"] == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
    assert config["lora_dropout"] == 0.0 and (config["r"], config["lora_alpha"]) == (2, 16)
    config, _ = read_peft(save_peft(adapter, tmp_path / "b", plan.config.replace(dropout=0.25)))
    assert config["lora_dropout"] == 0.25
