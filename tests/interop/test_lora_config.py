"""`PeftConfig`, and which modules its patterns mean."""

import json

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from lora_torch.lora import PeftConfig  # noqa: E402
from lora_torch.matching import ModuleMatcher, wildcard_match  # noqa: E402


def test_positional_order_and_defaults():
    config = PeftConfig(["a"], [], False, 4, 16, 0.1, "pre", "kaiming", "bf16", True)
    assert (config.target_modules, config.exclude_modules, config.match_all_linear) == (["a"], [], False)
    assert (config.dim, config.alpha, config.dropout, config.dropout_position) == (4, 16, 0.1, "pre")
    assert (config.lora_A_init, config.lora_dtype, config.use_triton) == ("kaiming", torch.bfloat16, True)
    defaults = PeftConfig()
    assert (defaults.dim, defaults.alpha, defaults.dropout, defaults.dropout_position) == (8, 32, 0.0, "post")
    assert (defaults.lora_A_init, defaults.lora_dtype, defaults.use_triton) == ("xavier", None, False)
    assert (defaults.use_dora, defaults.use_memory_efficient_lora, defaults.moe_rank_scaling) == (False, True, False)
    with pytest.raises(TypeError):
        PeftConfig(["a"], [], False, 4, 16, 0.1, "pre", "kaiming", None, True, True)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", "bf16", torch.bfloat16])
def test_round_trip_through_json(dtype):
    config = PeftConfig(["*.q_proj"], dim=3, lora_dtype=dtype, use_dora=True)
    assert config.lora_dtype == torch.bfloat16
    written = json.loads(json.dumps(config.to_dict()))
    assert written["lora_dtype"] == "bfloat16" and PeftConfig.from_dict(written) == config
    assert PeftConfig.from_dict({}) == PeftConfig()


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"dim": 0}, ValueError, "dim=0 is the rank"),
        ({"dim": 300, "use_triton": True}, ValueError, "dim=300: the Triton kernels take ranks up to 256"),
        ({"dim": 2.5}, ValueError, r"dim=2\.5"),
        ({"alpha": 0}, ValueError, "alpha=0 multiplies the adapter by zero"),
        ({"alpha": float("nan")}, ValueError, "alpha=nan: write a finite number"),
        ({"dropout": 1.0}, ValueError, r"dropout=1\.0 is a probability: write a number in \[0, 1\)"),
        ({"dropout_position": "mid"}, ValueError, 'dropout_position=\'mid\': write "pre" or "post"'),
        ({"lora_A_init": "xaver"}, ValueError, "lora_A_init='xaver': did you mean xavier?"),
        ({"lora_dtype": "int8"}, TypeError, "lora_dtype='int8': factors are float64"),
        ({"lora_dtype": "brain"}, ValueError, "lora_dtype='brain' is not a dtype"),
        ({"use_dora": "yes"}, TypeError, "use_dora='yes': write True or False"),
        ({"target_modules": ["a"], "exclude_modules": ["b"]}, ValueError, "contradict each other"),
        ({"target_modules": ["a"], "match_all_linear": True}, ValueError, "adapts every linear layer"),
        ({"target_modules": ["*(proj"]}, ValueError, r"pattern '\*\(proj' is not a regular expression"),
        ({"target_modules": [3]}, TypeError, "target_modules takes names or patterns, got 3"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        PeftConfig(**options)


def test_unknown_fields():
    with pytest.raises(TypeError, match="PeftConfig has no field 'use_tritn'; did you mean use_triton"):
        PeftConfig.from_dict({"use_tritn": True})


@pytest.mark.parametrize("value", [3, {"q_proj"}])
def test_patterns_that_are_no_list(value):
    with pytest.raises(TypeError, match="target_modules=.*: write a list of names or patterns"):
        PeftConfig(target_modules=value)


@pytest.mark.parametrize(
    "pattern,name,wanted",
    [
        ("*.layers.0.*.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*.layers.0.*.q_proj", "model.layers.1.self_attn.q_proj", False),
        ("*.layers.1.*", "model.layers.1.self_attn.q_proj", True),
        ("*.layers.1.*", "model.layers.10.self_attn.q_proj", False),  # a number is a whole one
        ("*.layers.1.*.q_proj", "model.layers.10.self_attn.q_proj", False),
        ("1.*", "10.fc", False),
        ("*_proj", "layers.0.q_proj", True),
        ("*_proj", "layers.0.q_proj.base", False),  # the whole name
        (".*fc.*", "decoder.fc1", True),
        ("fc.*", "fc", True),  # `.*` is one already, and any text may be none
        ("fc.", "fc1", True),  # dots stay a regular expression's
        ("fc1", "decoder.fc1", False),
        ("q_proj", None, False),
    ],
)
def test_wildcards(pattern, name, wanted):
    assert wildcard_match(pattern, name) is wanted


def test_the_matcher():
    linear, norm = nn.Linear(2, 2), nn.LayerNorm(2)
    by_target = ModuleMatcher("q_proj")
    assert by_target.match(linear, "q_proj") and not by_target.match(linear, "layers.0.q_proj")
    assert by_target.match(linear, "q_proj", prefix="layers.0")  # the name itself, below any prefix
    others = ModuleMatcher(exclude_modules=["*head"])
    assert others.match(linear, "q_proj") and not others.match(linear, "lm_head") and not others.match(norm, "norm")
    everything = ModuleMatcher(match_all_linear=True)
    assert everything.match(linear, "lm_head") and not everything.match(norm, "norm")


def test_nothing_named_means_proj(caplog):
    matcher = ModuleMatcher()
    assert matcher.target_modules == ["*_proj"] and "target_modules=['*_proj']" in caplog.text
