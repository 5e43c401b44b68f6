"""`LoRAConfig` against PEFT's own configuration class and PEFT's own matching; and what must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax import LoRAConfig
from lora_jax.peft_config import from_peft, to_peft
from lora_jax.peft_matching import is_target, pattern_values
from lora_jax.targets import Patterns, from_pattern, in_layers

NAMES = [
    "model.embed_tokens",
    "lm_head",
    *(f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1, 10) for x in "qkv"),
    *(f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1, 10) for x in ("up", "down")),
    "model.layers.1.block_sparse.experts.3.w1",
    "layers.0.proj",
    "encoder.layer.2.attention.self.query",
    "classifier.dense",
]

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "suffixes": dict(target_modules=["q_proj", "mlp.up_proj"]),
    "full names": dict(target_modules=["model.layers.1.self_attn.q_proj", "lm_head"]),
    "regex": dict(target_modules=r".*layers\.[01]\..*(q|v)_proj"),
    "exclusion": dict(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.self_attn.v_proj"]),
    "excluded by regex": dict(target_modules=["q_proj"], exclude_modules=r".*layers\.10\..*"),
    "layers": dict(target_modules=["q_proj", "model.layers.0.self_attn.k_proj"], layers_to_transform=[1, 10]),
    "one layer, of a list": dict(target_modules=["q_proj", "query"], layers_to_transform=2, layers_pattern="layer"),
    "patterns": dict(
        rank_pattern={"q_proj": 4, "layers.1.self_attn.v_proj": 6, "^model.layers.0.*up_proj": 3},
        alpha_pattern={"down_proj": 2.5},
    ),
    "all the numbers": dict(rank=3, alpha=1.5, use_rslora=True, dropout=0.1, modules_to_save=["classifier"]),
    "gaussian": dict(init="gaussian"),
    "orthogonal": dict(init="orthogonal"),
    "random": dict(init="random"),
}


def config_of(name: str) -> LoRAConfig:
    return LoRAConfig(**{"target_modules": ["q_proj", "up_proj", "down_proj", "v_proj"], **CONFIGS[name]})


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str) -> None:
    config = config_of(name)
    assert LoRAConfig.from_peft(json.loads(json.dumps(config.to_peft()))) == config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_adapts_what_we_adapt(name: str) -> None:
    """PEFT's class accepts the dictionary and resolves names, ranks and alphas as our planner does."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    config = config_of(name)
    theirs = peft.LoraConfig(**config.to_peft())
    targets, excludes = Patterns(config.target_modules), Patterns(config.exclude_modules)
    found = 0
    for module in NAMES:
        path = (*module.split("."), "kernel")
        match = targets.match(path)
        ours = match is not None and not excludes.match(path) and (match[1] or in_layers(path, config))
        expected = bool(check_target_module_exists(theirs, module))
        assert ours == expected, module
        assert is_target(config.to_peft(), module) == expected, module
        found += expected
        key = get_pattern_key(theirs.rank_pattern.keys(), module)
        assert config.rank_pattern.get(from_pattern(path, dict(config.rank_pattern)), config.rank) == (
            theirs.rank_pattern.get(key, theirs.r)
        )
        assert (pattern_values(theirs.rank_pattern, module) or [theirs.r])[0] == theirs.rank_pattern.get(key, theirs.r)
    assert 0 < found < len(NAMES)
    assert (theirs.r, theirs.lora_alpha, theirs.use_rslora, theirs.lora_dropout) == (
        config.rank,
        config.alpha,
        config.use_rslora,
        config.dropout,
    )


@pytest.mark.parametrize("wild", [["*.layers.0.*.q_proj", "up_proj"], ["*layers.1?.*"], "*.[qk]_proj", ["*.[!q]_proj"]])
def test_wildcards_become_one_expression(wild: Any) -> None:
    ours, theirs = Patterns(wild), to_peft(LoRAConfig(target_modules=wild))
    hits = [bool(ours.match((*m.split("."), "kernel"))) for m in NAMES]
    assert hits == [is_target(theirs, m) for m in NAMES]
    assert any(hits) and not all(hits)
    assert isinstance(theirs["target_modules"], str) and "(?>" not in theirs["target_modules"]


@pytest.mark.filterwarnings("ignore")
def test_reads_what_peft_writes(tmp_path: Path) -> None:
    """Every key of PEFT's own file is known; a key of another release is not."""
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"], rank_pattern={"x": 2}, lora_dropout=0.05)
    theirs.save_pretrained(str(tmp_path))
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    want = LoRAConfig(rank=4, alpha=7, target_modules=["q_proj"], rank_pattern={"x": 2}, dropout=0.05)
    assert from_peft(data) == from_peft(theirs.to_dict()) == want
    with pytest.raises(ValueError, match="unknown keys `from_the_future`"):
        from_peft({**data, "from_the_future": 1})
    assert from_peft({**data, "from_the_future": 1}, strict=False) == want


def test_sets_of_names_come_out_in_one_order() -> None:
    """PEFT keeps targets as a set, whose order is another in every process: hosts must not differ in their plans."""
    names = [f"module_{i}" for i in range(50)]
    assert from_peft({**MINIMAL, "target_modules": set(names)}).target_modules == tuple(sorted(names))


@pytest.mark.filterwarnings("ignore")
def test_targets_that_are_excluded_are_no_targets() -> None:
    """PEFT stores "all-linear" as full names and leaves those in that `exclude_modules` takes out again."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = torch.nn.ModuleDict(
        {f"block_{i}": torch.nn.ModuleDict({k: torch.nn.Linear(2, 2) for k in "qkv"}) for i in "01"}
    )
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", exclude_modules=["k"]))
    stored = adapted.peft_config["default"].to_dict()
    assert "block_0.k" in stored["target_modules"]
    config = from_peft(stored)
    assert config.target_modules == tuple(f"block_{i}.{k}" for i in "01" for k in "qv")
    params = {f"block_{i}": {k: {"kernel": jnp.ones((2, 2))} for k in "qkv"} for i in "01"}
    plan = lj.plan(lambda p: [jnp.ones((1, 2)) @ w for w in jax.tree.leaves(p)], params, config=config)
    adapted_names = {
        n.removesuffix(".lora_A") for n, _ in adapted.base_model.model.named_modules() if n.endswith("lora_A")
    }
    assert {site.module for site in plan.sites} == adapted_names


MINIMAL = {"peft_type": "LORA", "target_modules": ["q_proj"]}


@pytest.mark.filterwarnings("ignore")
def test_defaults_are_pefts() -> None:
    """Every field that is refused when set is off in PEFT's own defaults, and none of PEFT's is unknown."""
    peft = pytest.importorskip("peft")
    config = from_peft(MINIMAL)
    assert (config.rank, config.alpha) == (8, 8)
    assert from_peft(peft.LoraConfig(target_modules=["q_proj"]).to_dict()) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "loftq"),
        ("alora_invocation_tokens", [7]),
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2}),
        ("corda_config", {"x": 1}),
        ("lora_ga_config", {"x": 1}),
        ("kasa_config", {"x": 1}),
        ("arrow_config", {"x": 1}),
        ("velora_config", {"x": 1}),
        ("monteclora_config", {"x": 1}),
        ("use_bdlora", {"x": 1}),
        ("megatron_config", {"x": 1}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        from_peft({**MINIMAL, field: value})
    assert f"`{field}={value!r}` is not implemented" in str(error.value)


def test_all_refusals_in_one_error() -> None:
    with pytest.raises(ValueError) as error:
        from_peft({**MINIMAL, "alora_invocation_tokens": [7], "nonsense": 0, "init_lora_weights": "olora"})
    for part in ("alora_invocation_tokens=[7]", "nonsense", "init_lora_weights='olora'"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"target_modules": ["q"]}, "no `peft_type`"),
        ({**MINIMAL, "peft_type": "IA3"}, "`peft_type='IA3'` is another method"),
        ({**MINIMAL, "peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"peft_type": "LORA"}, "`target_modules` is missing"),
        ({**MINIMAL, "r": 0}, "`rank=0` must be a positive whole number"),
        ({**MINIMAL, "r": "8"}, "`rank='8'`"),
        ({**MINIMAL, "lora_alpha": float("nan")}, "`alpha=nan`"),
        ({**MINIMAL, "lora_dropout": 1.5}, "`dropout=1.5`"),
        ({**MINIMAL, "target_modules": ".*", "layers_to_transform": [1]}, "needs a list in `target_modules`"),
        ({**MINIMAL, "target_parameters": "experts.w"}, "write a list"),
        ({**MINIMAL, "task_type": "SEQ_CLS"}, "modules called classifier or score"),
    ],
)
def test_other_refusals(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_peft(data)


def test_not_a_dictionary() -> None:
    with pytest.raises(TypeError, match="is a dictionary, got list"):
        from_peft([])  # type: ignore[arg-type]


def test_target_parameters_join_the_targets() -> None:
    parameters = {"target_parameters": ["experts.down_proj"]}
    assert from_peft({**MINIMAL, **parameters}).target_modules == ("q_proj", "experts.down_proj")
    assert from_peft({"peft_type": "LORA", "target_modules": [], **parameters}).target_modules == ("experts.down_proj",)
    both = from_peft({**MINIMAL, "target_modules": r".*\.q_proj", **parameters})
    patterns = Patterns(both.target_modules)
    assert patterns.match(("layers", "0", "q_proj", "kernel")) and patterns.match(("mlp", "experts", "down_proj"))
    assert not patterns.match(("layers", "0", "k_proj", "kernel"))


def test_what_peft_cannot_say() -> None:
    with pytest.raises(ValueError, match="no initialisation like `init='xavier'`"):
        to_peft(LoRAConfig(init="xavier"))
    assert to_peft(LoRAConfig(init="xavier"), trained=True)["init_lora_weights"] is True
    with pytest.raises(ValueError, match="`task_type='CLASSIFY'` is unknown"):
        to_peft(LoRAConfig(), task_type="CLASSIFY")
    with pytest.raises(ValueError, match="PEFT has no wildcards"):
        to_peft(LoRAConfig(target_modules=["*.q", "k"], layers_to_transform=[1]))


def test_only_what_is_used_is_written() -> None:
    """Old readers warn of keys they do not know."""
    assert set(to_peft(LoRAConfig())) == {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "bias",
        "fan_in_fan_out",
        "init_lora_weights",
    }


def test_switches_are_true_or_false() -> None:
    with pytest.raises(TypeError, match="`use_rslora='false'`: write True or False"):
        from_peft({**MINIMAL, "use_rslora": "false"})
    assert not from_peft({**MINIMAL, "use_rslora": None}).use_rslora
    with pytest.raises(ValueError, match="`init_lora_weights='pissa'` is not implemented: use one of True, 'gaussian'"):
        from_peft({**MINIMAL, "init_lora_weights": "pissa"})
