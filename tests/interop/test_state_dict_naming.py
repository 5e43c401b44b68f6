"""Names alone: patterns, the general rules, stacks, and the index from PyTorch modules back to Flax paths."""

import pytest

from lora_torch import Naming, Rule, module_index, module_name, module_names, torch_name, torch_names
from lora_torch.patterns import Pattern

pytestmark = pytest.mark.pinned


@pytest.mark.parametrize(
    "path,name",
    [
        ("model.layers.0.self_attn.q_proj.kernel", "model.layers.0.self_attn.q_proj.weight"),
        ("layers_0.attn.q.kernel", "layers.0.attn.q.weight"),
        ("layers_12.norm.scale", "layers.12.norm.weight"),
        ("Dense_0.bias", "Dense.0.bias"),
        ("embed.embedding", "embed.weight"),
        ("bn.mean", "bn.running_mean"),
        ("bn.var", "bn.running_var"),
        ("cls_token", "cls_token"),
        ("layer_0_1.kernel", "layer_0_1.weight"),  # two numbers: not the index of a list
        ("block_1.scale_2", "block.1.scale_2"),  # a leaf is no list
        ("kernel", "weight"),
    ],
)
def test_general_rules(path: str, name: str) -> None:
    assert torch_name(tuple(path.split("."))) == name


def test_module_names() -> None:
    assert module_name(("model", "layers", "0", "self_attn", "q_proj", "kernel")) == "model.layers.0.self_attn.q_proj"
    assert module_name(("layers_0", "attn", "q", "kernel")) == "layers.0.attn.q"
    assert module_name(("layers", "attn", "q", "kernel"), Naming(stacks=("layers",))) == "layers.{i}.attn.q"
    assert module_name(("embed", "embedding")) == "embed"
    assert module_name(("head_proj",)) == "head_proj"  # a raw parameter is its own site
    assert module_name(("layers_3", "attn", "o", "w")) == "layers.3.attn.o"
    tunix = Naming("tunix")
    assert module_name(("layers", "0", "attn", "q_proj", "w"), tunix) == "model.layers.0.self_attn.q_proj"
    assert module_name(("embedder", "input_embedding"), tunix) == "model.embed_tokens"
    experts = module_name(("layers", "2", "mlp", "up_proj"), tunix)
    assert experts == "model.layers.2.mlp.experts.{e}.up_proj"
    kv = ("layers", "1", "attn", "kv_einsum", "w")
    assert module_names(kv, tunix) == ("model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj")
    with pytest.raises(ValueError, match="becomes several tensors .* use `torch_names`"):
        torch_name(kv, tunix)


def test_presets_differ_where_families_do() -> None:
    path = ("h", "0", "ln_1", "scale")
    assert torch_name(path, Naming("hf-flax")) == "h.0.ln_1.weight"
    assert torch_name(path, Naming("nnx")) == "h.0.ln_1.weight"
    assert torch_name(path, Naming("linen")) == "h.0.ln.1.weight"
    resnet = ("encoder", "stages", "0", "layers", "1", "layer", "layer_1", "convolution", "kernel")
    assert torch_name(resnet, Naming("hf-flax")) == "encoder.stages.0.layers.1.layer.1.convolution.weight"


def test_renames_keep_their_literal_text_and_finish_what_wildcards_matched() -> None:
    naming = Naming(
        names={
            "layers_*.attn.**": "model.layers.*.self_attn.**",
            "**.norm.scale": "**.norm.scale",
            "layers_0.attn.q.kernel": "first.q",  # exact beats a pattern, whatever the order
        }
    )
    assert torch_name(("layers_3", "attn", "sub_1", "kernel"), naming) == "model.layers.3.self_attn.sub.1.weight"
    assert torch_name(("a_1", "norm", "scale"), naming) == "a.1.norm.scale"
    assert torch_name(("norm", "scale"), naming) == "norm.scale"
    assert torch_name(("layers_0", "attn", "q", "kernel"), naming) == "first.q"
    prefixed = Naming(names={"**": "bert.**"})
    assert torch_name(("encoder_0", "kernel"), prefixed) == "bert.encoder.0.weight"
    # The end of a wildcard that stops before the leaf is a module, even where the target ends with it.
    assert torch_name(("a", "scale", "kernel"), Naming(names={"a.*.kernel": "b.*"})) == "b.scale"


def test_stacks() -> None:
    nested = Naming(stacks=("stages", "stages.blocks"))
    assert torch_name(("stages", "blocks", "q", "kernel"), nested) == "stages.{i}.blocks.{j}.q.weight"
    renamed = Naming(stacks=("ScanBlock_0",), names={"ScanBlock_0.**": "model.layers.**"})
    assert torch_name(("ScanBlock_0", "q", "kernel"), renamed) == "model.layers.{i}.q.weight"
    wild = Naming(stacks={"*.layers": 1})
    assert torch_names(("decoder", "layers", "q", "kernel"), wild) == ("decoder.layers.{i}.q.weight",)
    # One string is one prefix, not its letters.
    assert torch_name(("layers", "q", "kernel"), Naming(stacks="layers")) == "layers.{i}.q.weight"  # type: ignore[arg-type]


def test_index_inverts_names() -> None:
    stacked, plain = ("layers", "attn", "q", "kernel"), ("head", "kernel")
    found = module_index({stacked: (3, 8, 8), plain: (8, 2)}, Naming("linen", stacks=("layers",)))
    assert found == {**{f"layers.{i}.attn.q": (stacked, (i,)) for i in range(3)}, "head": (plain, ())}
    kv, experts = ("layers", "0", "attn", "kv_einsum", "w"), ("layers", "0", "mlp", "gate_proj")
    found = module_index({kv: (2, 2, 8, 4), experts: (2, 8, 6)}, Naming("tunix"))
    assert found == {
        "model.layers.0.self_attn.k_proj": (kv, (0,)),
        "model.layers.0.self_attn.v_proj": (kv, (1,)),
        "model.layers.0.mlp.experts.0.gate_proj": (experts, (0,)),
        "model.layers.0.mlp.experts.1.gate_proj": (experts, (1,)),
    }
    with pytest.raises(ValueError, match=r"a_0.kernel and a.0.kernel both become the module 'a.0'"):
        module_index({("a", "0", "kernel"): (2, 2), ("a_0", "kernel"): (2, 2)})
    with pytest.raises(ValueError, match="has 2 names|length 3 left to be told apart"):
        module_index({kv: (3, 2, 8, 4)}, Naming("tunix"))


@pytest.mark.parametrize("text", ["", "a..b", "a.***", "a.b**", ".a"])
def test_malformed_patterns(text: str) -> None:
    with pytest.raises(ValueError, match="write dotted segments"):
        Pattern(text)


def test_pattern_matches_whole_names() -> None:
    assert Pattern("a.*.c").match("a.b.c") == ("b",)
    assert Pattern("a.*.c").match("a.b.b.c") is None
    assert Pattern("**.c").match("c") == ("",)
    assert Pattern("a.**").match("a") is None
    assert Pattern("a+b.c").match("aab.c") is None  # no regular expression


@pytest.mark.parametrize(
    "rule,message",
    [
        (dict(match="a.*", to="b.**"), "both sides need the same wildcards"),
        (dict(match="a.*", to="b"), "both sides need the same wildcards"),
        (dict(match="kv", to=("k", "v")), "need a layout that splits"),
        (dict(match="kv", to=("k", "v"), layout="a b -> b a"), "does not name"),
        (dict(match="kv", to="k", layout="s a b -> b a"), r"splits the axes \['s'\]"),
        (dict(match="e", to="x.{i}.w", layout="i a b -> b a"), "number stacks of layers"),
        (dict(match="q"), "states neither a name"),
        (dict(match="q", to=()), "states neither a name"),
        (dict(match="q", layout="linear", part=0), "`part` counts from 0 and needs one name"),
        (dict(match="q", to="w", part=-1), "`part` counts from 0 and needs one name"),
        (dict(match="q", layout="nonsense"), "neither one of"),
    ],
)
def test_malformed_rules(rule: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**rule)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"preset 'hf' does not exist; there are \['gemma', 'hf-flax', 'linen'"):
        torch_name(("kernel",), Naming("hf"))
