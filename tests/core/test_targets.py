"""Which parameters a configuration names: against PEFT's own matching, and what is an error here."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.targets import from_pattern, layer_of

X = jnp.ones((2, 4))


def model(layers: int = 3, outer: bool = True, **more: Any) -> dict[str, Any]:
    """Parameters of `layers` layers with a q, a k and a norm each, and a head r."""
    tree = {
        f"layers_{i}": {
            "q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
            "k": {"kernel": jnp.ones((4, 4))},
            "norm": {"scale": jnp.ones(4)},
        }
        for i in range(layers)
    }
    tree = {**tree, "r": {"kernel": jnp.ones((4, 2))}}
    return {"m": tree, **more} if outer else {**tree, **more}


def forward(params: Any, x: Any, skip: tuple[str, ...] = ()) -> Any:
    """Uses every parameter but those of `skip`."""
    tree = params.get("m", params)
    for name in [n for n in tree if n.startswith("layers_")]:
        layer = tree[name]
        x = x * layer["norm"]["scale"]
        for part in "qk":
            if f"{name}.{part}" not in skip:
                x = x @ layer[part]["kernel"]
        x = x + layer["q"]["bias"]
    return x @ tree["r"]["kernel"]


def adapted(params: Any = None, skip: tuple[str, ...] = (), **config: Any) -> dict[str, int]:
    """Rank of every adapted module."""
    params = model() if params is None else params
    plan = lj.plan(lambda p, x: forward(p, x, skip), params, X, config=lj.LoRAConfig(**{"rank": 2, **config}))
    return {site.module: site.rank for site in plan.sites if not site.is_full}


def refusal(params: Any = None, skip: tuple[str, ...] = (), **config: Any) -> str:
    with pytest.raises(ValueError) as error:
        adapted(params, skip, **config)
    return str(error.value)


# --- against PEFT ----------------------------------------------------------------------------------------------

MODULES = [
    "model.embed_tokens",
    "lm_head",
    "proj",
    "mlp.proj",
    "q_proj",
    *(f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1, 10) for x in "qv"),
    *(f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in (0, 1) for j in (0, 1)),
    "decoder.blocks.1.layers.0.q_proj",
    "encoder.blocks.0.q_proj",
    "classifier",
    "classifier.dense",
    "my_classifier.dense",
]

CASES: dict[str, dict[str, Any]] = {
    "an end on whole parts": dict(target_modules=["proj"]),
    "two parts": dict(target_modules=["self_attn.q_proj", "mlp.proj"]),
    "a full name": dict(target_modules=["model.layers.1.self_attn.v_proj"]),
    "not another word's end": dict(target_modules=["classifier.dense"]),
    "regex, full match only": dict(target_modules="q_proj"),
    "regex": dict(target_modules=r".*\.(q|v)_proj"),
    "regex with layers": dict(target_modules=r"model\.layers\.(0|10)\..*"),
    "exclusion wins": dict(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.self_attn.v_proj"]),
    "exclusion by regex": dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.layers\.1\..*"),
    "exclusion, full match only": dict(target_modules=["q_proj"], exclude_modules="q_proj"),
    "saved modules win": dict(target_modules=["dense", "q_proj"], modules_to_save=["classifier"]),
    "one layer": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=1),
    "layers": dict(target_modules=["q_proj"], layers_to_transform=[0, 10]),
    "the first number counts": dict(target_modules=["up_proj"], layers_to_transform=[0]),
    "full names pass the layers": dict(
        target_modules=["q_proj", "lm_head", "model.layers.0.self_attn.v_proj"], layers_to_transform=[1]
    ),
    "a full name beside its end": dict(
        target_modules=["q_proj", "model.layers.0.self_attn.q_proj"], layers_to_transform=[1]
    ),
    "a layer list": dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers"),
    "another layer list": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="blocks"),
    "two layer lists": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["blocks", "layers"]),
    "two layer lists, turned": dict(
        target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["layers", "blocks"]
    ),
}


def node(tree: Any, module: str) -> Any:
    for part in module.split("."):
        tree = tree.setdefault(part, {})
    return tree


def every_module() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for module in MODULES:
        node(tree, module)["kernel"] = jnp.ones((4, 4))
    return tree


def planned(config: lj.LoRAConfig) -> set[str]:
    """The modules that a plan adapts in a model that has them all."""

    def fn(params: Any, x: Any) -> Any:
        return [x @ node(params, module)["kernel"] for module in MODULES]

    return {site.module for site in lj.plan(fn, every_module(), X, config=config).sites if not site.is_full}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_peft_adapts_the_same_modules(name: str) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(**CASES[name])
    config = lj.LoRAConfig(**CASES[name])
    expected = {m for m in MODULES if check_target_module_exists(theirs, m)}
    assert 0 < len(expected) < len(MODULES)
    assert planned(config) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 4},
        {"q_proj": 4, "layers.1.self_attn.q_proj": 6},
        {"layers.1.self_attn.q_proj": 6, "q_proj": 4},
        {"^model.layers.0.self_attn.q_proj": 3, r"layers\.\d+\..*_proj": 5},
        {"proj": 7},
        {"q_proj|v_proj": 9},
    ],
)
def test_the_pattern_that_counts_is_pefts(pattern: dict[str, int]) -> None:
    other = pytest.importorskip("peft.utils.other")
    found = {m: from_pattern((*m.split("."), "kernel"), pattern) for m in MODULES}
    assert found == {m: k if (k := other.get_pattern_key(pattern.keys(), m)) in pattern else None for m in MODULES}
    assert any(found.values())


def test_a_list_of_layers_needs_nothing_before_it() -> None:
    """Where PEFT sees no layer: Flax writes `layers_0` at the top."""
    config = lj.LoRAConfig(target_modules=["q"], layers_to_transform=[0])
    assert layer_of(("layers_0", "q", "kernel"), config) == (0, None)
    assert layer_of(("layers", "3", "q", "kernel"), config) == (3, None)
    assert layer_of(("layers_0", "experts_1", "q", "kernel"), config) == (0, None)
    assert layer_of(("m", "layers_2", "q", "kernel"), config) == (2, None)
    assert layer_of(("head", "kernel"), config) is None
    assert adapted(model(outer=False), target_modules=["q"], layers_to_transform=[0, 2]) == {
        "layers_0.q": 2,
        "layers_2.q": 2,
    }


# --- entries that overlap --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["q", "layers.0.q"], ["q"] * 3),
        (["layers.0.q", "layers.0.q.kernel", "m.layers_0.q"], ["q"]),
        (["*.q", "q", "m.layers_1.q"], ["q"] * 3),
        (["q", "k", "*layers_2.*"], ["q", "k"] * 3),
    ],
)
def test_entries_that_name_the_same_parameter_all_count(targets: list[str], modules: list[str]) -> None:
    assert sorted(name.split(".")[-1] for name in adapted(target_modules=targets)) == sorted(modules)


def test_overlapping_saved_and_excluded_entries_all_count() -> None:
    found = adapted(
        target_modules=["q"],
        modules_to_save=["r", "m.r", "m.layers_0.k"],
        exclude_modules=["layers_0.q", "layers.0.q", "*.layers_0.q"],
    )
    assert found == {"m.layers_1.q": 2, "m.layers_2.q": 2}


def test_a_shadowed_pattern_says_what_shadows_it() -> None:
    text = refusal(target_modules=["q"], rank_pattern={"q": 4, "layers.0.q": 8})
    assert "`rank_pattern` entry `layers.0.q` has no effect: `q` stands before it" in text and "put it first" in text
    turned = adapted(target_modules=["q"], rank_pattern={"layers.0.q": 8, "q": 4})
    assert turned == {"m.layers_0.q": 8, "m.layers_1.q": 4, "m.layers_2.q": 4}
    assert set(adapted(target_modules=["q"], rank_pattern={"q": 4, "layers.0.q": 4}).values()) == {4}


# --- entries without effect ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            dict(target_modules=["q", "layers.0.k"], exclude_modules=["k"]),
            "`target_modules` entry `layers.0.k` has no effect: `exclude_modules` entry `k` excludes what it names",
        ),
        (
            dict(target_modules=["q", "r"], modules_to_save=["r"]),
            "`target_modules` entry `r` has no effect: `modules_to_save` entry `r` trains what it names",
        ),
        (
            dict(target_modules=["q"], exclude_modules=["r"], modules_to_save=["r"]),
            "`exclude_modules` entry `r` has no effect: `modules_to_save` entry `r` trains what it names",
        ),
        (
            dict(target_modules=["q", "layers_1.k"], layers_to_transform=[0]),
            "entry `layers_1.k` has no effect: `layers_to_transform` leaves out what it names in layer 1",
        ),
        (
            dict(target_modules=["q", "r"], layers_to_transform=[0]),
            "entry `r` has no effect: `layers_to_transform` leaves out what it names in no layer",
        ),
        (dict(target_modules=["q", "norm"]), "names only parameters that cannot be adapted: `m.layers_0.norm.scale`"),
        (dict(target_modules=["q_proj"]), "`target_modules` entry `q_proj` matches nothing; closest: `"),
        (dict(target_modules=["q"], exclude_modules=["zz"]), "`exclude_modules` entry `zz` matches nothing"),
        (dict(target_modules=["q"], modules_to_save=["head"]), "`modules_to_save` entry `head` matches nothing"),
        (dict(target_modules=["q"], alpha_pattern={"k": 4}), "`alpha_pattern` entry `k` matches nothing"),
    ],
)
def test_an_entry_without_effect_says_why(config: dict[str, Any], reason: str) -> None:
    assert reason in refusal(**config)


def test_all_entries_without_effect_are_in_one_error() -> None:
    text = refusal(target_modules=["q", "zz"], exclude_modules=["yy"], rank_pattern={"xx": 3})
    assert all(f"entry `{entry}` matches nothing" in text for entry in ("zz", "yy", "xx"))


def test_nothing_left_to_adapt_says_why() -> None:
    """PEFT's four cases: no such module, all of them excluded, some of each, and nothing named."""
    absent, excluded = "entry `zz` matches nothing", "entry `q` has no effect: `exclude_modules` entry `q` excludes"
    only_absent, only_excluded = refusal(target_modules=["zz"]), refusal(target_modules=["q"], exclude_modules=["q"])
    assert absent in only_absent and "excludes" not in only_absent
    assert excluded in only_excluded and "matches nothing" not in only_excluded
    both = refusal(target_modules=["q", "zz"], exclude_modules=["q"])
    assert absent in both and excluded in both
    assert "`target_modules='all-linear'` finds no linear weight" in refusal(
        target_modules="all-linear", exclude_modules=r".*"
    )
    with pytest.raises(ValueError, match="`target_modules` is empty; name at least one module"):
        lj.LoRAConfig(target_modules=[])


# --- layers ----------------------------------------------------------------------------------------------------


def test_a_layer_that_is_not_there_is_an_error() -> None:
    text = refusal(target_modules=["q"], layers_to_transform=[0, 99])
    assert "`layers_to_transform` names layer 99, which holds nothing targeted" in text and "layer 0," not in text
    assert adapted(target_modules=["q"], layers_to_transform=[0, 2]) == {"m.layers_0.q": 2, "m.layers_2.q": 2}


def test_wildcards_keep_to_the_layers() -> None:
    assert adapted(target_modules=["*q"], layers_to_transform=[1]) == {"m.layers_1.q": 2}


def test_a_layer_list_that_is_not_there_is_an_error() -> None:
    config = dict(target_modules=["q"], layers_to_transform=[1])
    text = refusal(**config, layers_pattern=["layers", "blocks"])
    assert "`layers_pattern` entry `blocks` is the list of no targeted layer" in text and "`layers` is" not in text
    assert adapted(**config, layers_pattern="layers") == {"m.layers_1.q": 2}


def test_layers_that_nothing_listens_to_are_an_error() -> None:
    """Full names pass the filter; a filter that nothing goes through is a mistake."""
    assert "names layer 1, which holds nothing targeted" in refusal(target_modules=["m.r"], layers_to_transform=[1])
    assert adapted(target_modules=["m.layers_1.q"], layers_to_transform=[1]) == {"m.layers_1.q": 2}


# --- weights that an entry names in vain -----------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q"], ["*.q"], ["q", "layers_0.q"], r".*layers_\d\.q", ["kernel"]])
def test_an_unused_weight_beside_used_ones_is_an_error(targets: Any) -> None:
    text = refusal(skip=("layers_1.q",), target_modules=targets)
    assert "also names weights that cannot be adapted: `m.layers_1.q.kernel` (4, 4): never used" in text
    left = adapted(skip=("layers_1.q",), target_modules=["q"], exclude_modules=["layers_1.q"])
    assert left == {"m.layers_0.q": 2, "m.layers_2.q": 2}


@pytest.mark.parametrize("targets", ["all-linear", ".*"])
def test_what_asks_for_whatever_can_be_adapted_leaves_unused_weights_out(targets: str) -> None:
    assert "m.layers_1.q" not in adapted(skip=("layers_1.q",), target_modules=targets)


def test_biases_and_norms_beside_a_weight_are_no_error() -> None:
    assert len(adapted(target_modules=["q"])) == 3
    assert len(adapted(target_modules=["*layers_0.*"])) == 2


def test_a_weight_that_is_read_in_another_way_is_an_error() -> None:
    """Layer 0 contracts its w, layer 1 sorts it: no factors for that, and no silent skip."""

    def fn(params: Any, x: Any) -> Any:
        return x @ params["layers_0"]["w"] + jnp.sort(params["layers_1"]["w"], 0)[0]

    params = {f"layers_{i}": {"w": jnp.ones((4, 4))} for i in range(2)}
    with pytest.raises(ValueError, match=r"also names weights .*`layers_1\.w` \(4, 4\): never contracted"):
        lj.plan(fn, params, X, config=lj.LoRAConfig(target_modules=["w"]))
    assert len(lj.plan(fn, params, X, config=lj.LoRAConfig(target_modules=["layers_0.w"])).sites) == 1


def test_only_what_can_train_is_saved() -> None:
    params = model(step={"count": jnp.zeros(3, jnp.int32)})
    text = refusal(params, target_modules=["q"], modules_to_save=["step"])
    assert "`step` names only parameters that cannot be trained: `step.count` (3,): not floating point" in text
    text = refusal(skip=("layers_1.k",), target_modules=["q"], modules_to_save=["layers_1.k"])
    assert "cannot be trained: `m.layers_1.k.kernel` (4, 4): never used" in text
    text = refusal(skip=("layers_1.k",), target_modules=["q"], modules_to_save=["k"])
    assert "`k` also names weights that cannot be trained: `m.layers_1.k.kernel` (4, 4): never used" in text
