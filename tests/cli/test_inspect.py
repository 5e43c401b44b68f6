"""`lora-jax inspect` against dense float64 products, and on files that it must refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.cli import main

pytestmark = pytest.mark.pinned

TOLERANCE = 1e-9  # both sides compute in float64 from the same float32 factors


def write(directory, tensors, **config):
    """An adapter directory by hand: `tensors` without the `base_model.model.` prefix."""
    directory.mkdir(exist_ok=True)
    known = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "conv", "emb"]}
    (directory / "adapter_config.json").write_text(json.dumps({**known, **config}))
    # save_file writes the raw memory of strided arrays.
    stored = {f"base_model.model.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(stored, directory / "adapter_model.safetensors")
    return directory


def rand(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def pair(rng, name="m.0.q", m=12, n=10, r=4):
    return {f"{name}.lora_A.weight": rand(rng, r, n), f"{name}.lora_B.weight": rand(rng, m, r)}


def inspected(directory, capsys, *options):
    assert main(["inspect", str(directory), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def check(row, dense, scaling):
    """`dense` is s * B @ A in float64."""
    values = np.linalg.svd(dense, compute_uv=False)[: len(row["singular_values"])]
    assert row["scaling"] == pytest.approx(scaling, rel=1e-12)
    assert row["norm_delta"] == pytest.approx(np.linalg.norm(dense), rel=TOLERANCE)
    np.testing.assert_allclose(row["singular_values"], values, rtol=1e-7, atol=TOLERANCE * values[0])
    p = values / values.sum()
    assert row["effective_rank"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-6)
    # A norm without the scale, or of another pairing of the factors, would not pass.
    assert row["norm_delta"] != pytest.approx(np.linalg.norm(dense / scaling), rel=1e-3)


@pytest.mark.parametrize("rslora", [False, True])
def test_matches_peft(tmp_path, capsys, rslora):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=11,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 7, "down_proj": 2},
        alpha_pattern={"v_proj": 3.5},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    report = inspected(tmp_path, capsys)
    rows = {row["module"]: row for row in report["modules"]}
    assert len(rows) == 33
    # Layer 10 comes after layer 9, not after layer 1.
    layers = [int(name.split(".")[2]) for name in (row["module"] for row in report["modules"])]
    assert layers == sorted(layers)
    for name, row in rows.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        dense = layer.scaling["default"] * (
            layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        check(row, dense.detach().numpy(), layer.scaling["default"])
        assert row["rank"] == layer.r["default"] and row["alpha"] == layer.lora_alpha["default"]
    total = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert report["totals"]["low_rank_parameters"] == total
    norms = [row["norm_delta"] for row in rows.values()]
    assert report["totals"]["norm_delta"] == pytest.approx(np.linalg.norm(norms), rel=1e-12)


def test_conv_embedding_and_groups(tmp_path, capsys):
    rng = np.random.default_rng(1)
    embedding = {"emb.lora_embedding_A": rand(rng, 4, 50), "emb.lora_embedding_B": rand(rng, 12, 4)}
    conv = {"b.conv.lora_A.weight": rand(rng, 4, 3, 5, 2), "b.conv.lora_B.weight": rand(rng, 8, 4, 1, 1)}
    grouped = {"c.conv.lora_A.weight": rand(rng, 4, 3, 5), "c.conv.lora_B.weight": rand(rng, 8, 2, 1)}
    write(tmp_path, embedding | conv | grouped)
    rows = {row["module"]: row for row in inspected(tmp_path, capsys)["modules"]}
    assert [rows[n]["kind"] for n in ("emb", "b.conv", "c.conv")] == ["embedding", "conv", "conv"]
    f8 = {k: v.astype(np.float64) for k, v in (embedding | conv | grouped).items()}
    check(rows["emb"], 2 * f8["emb.lora_embedding_B"] @ f8["emb.lora_embedding_A"], 2.0)
    b, a = f8["b.conv.lora_B.weight"][:, :, 0, 0], f8["b.conv.lora_A.weight"]
    check(rows["b.conv"], 2 * np.einsum("or,rixy->oixy", b, a).reshape(8, -1), 2.0)
    # Two groups: outputs 0-3 see ranks 0-1, outputs 4-7 see ranks 2-3.
    b, a = f8["c.conv.lora_B.weight"][:, :, 0], f8["c.conv.lora_A.weight"]
    dense = np.concatenate([np.einsum("or,rix->oix", b[:4], a[:2]), np.einsum("or,rix->oix", b[4:], a[2:])])
    check(rows["c.conv"], 2 * dense.reshape(8, -1), 2.0)


def test_bfloat16_factors(tmp_path, capsys):
    import ml_dtypes

    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in pair(np.random.default_rng(2)).items()}
    write(tmp_path, tensors)
    [row] = inspected(tmp_path, capsys)["modules"]
    b, a = (tensors[f"m.0.q.lora_{x}.weight"].astype(np.float64) for x in "BA")
    check(row, 2 * b @ a, 2.0)


def test_the_table_is_complete(tmp_path, capsys):
    rng = np.random.default_rng(3)
    long = "encoder." + "very_long_name_" * 12 + ".0.q"
    tensors = pair(rng, long) | pair(rng, "m.1.q")
    tensors["m.1.q.lora_B.weight"][:] = 0
    tensors |= {"score.weight": rand(rng, 3, 10)}
    write(tmp_path, tensors, modules_to_save=["score"])
    assert main(["inspect", str(tmp_path), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert long in out and "also score.weight 3×10" in out
    assert "2 modules, 176 parameters in factors, 30 in other tensors" in out
    assert "1 of 2 modules change nothing" in out


def test_not_a_number_is_told(tmp_path, capsys):
    tensors = pair(np.random.default_rng(4))
    tensors["m.0.q.lora_A.weight"][1, 1] = np.nan
    write(tmp_path, tensors)
    report = inspected(tmp_path, capsys)
    assert report["modules"][0]["norm_delta"] is None
    assert report["notes"] == ["NaN or infinite factors in m.0.q"]


def test_heat_map(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from lora_jax.cli._heat_map import heat_map_grid

    rng = np.random.default_rng(5)
    tensors = pair(rng, "h.0.attn.q") | pair(rng, "h.2.attn.q") | pair(rng, "h.2.mlp.q") | pair(rng, "q")
    write(tmp_path / "a", tensors)
    report = inspected(tmp_path / "a", capsys, "--png", str(tmp_path / "map.png"))
    pixels = imread(tmp_path / "map.png")
    assert pixels.shape[0] > 100 and pixels.shape[1] > 100 and len(np.unique(pixels.reshape(-1, 4), axis=0)) > 20
    norms = {row["module"]: row["norm_delta"] for row in report["modules"]}
    layers, types, grid = heat_map_grid(norms)
    assert layers == ["–", "0", "2"] and set(types) == {"attn.q", "mlp.q", "q"}
    assert grid[2, types.index("mlp.q")] == norms["h.2.mlp.q"]
    assert grid[0, types.index("q")] == norms["q"]
    assert np.isnan(grid[1, types.index("mlp.q")])
    assert main(["inspect", str(tmp_path / "a"), "--png", str(tmp_path / "map.jpg")]) == 2


def _truncate(d):
    path = d / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _config(**changes):
    def change(d):
        path = d / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _config_twice(d):
    path = d / "adapter_config.json"
    path.write_text(path.read_text().replace('"r":', '"r": 3, "r":'))


def _tensors(edit):
    def change(d):
        tensors = load_file(d / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, d / "adapter_model.safetensors")

    return change


P = "base_model.model."
BAD = {
    "truncated": (_truncate, "damaged"),
    "not safetensors": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 99), "damaged"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickle only": (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "pickle"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json"),
    "bad JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "not an object"),
    "a key twice": (_config_twice, "it has 'r' twice"),
    "no flag": (_config(use_dora="false"), "`use_dora` must be true or false"),
    "IA3": (_config(peft_type="IA3"), "'IA3'"),
    "experts": (_config(target_parameters=["experts.w"]), "target_parameters"),
    "alpha": (_config(lora_alpha="big"), "lora_alpha"),
    "rank": (_config(r=0), "positive"),
    "other rank": (_config(r=5), "m.0.q: the tensors have rank 4, the configuration says 5"),
    "bad regex": (_config(target_modules="(q"), "regular expression"),
    "bad pattern": (_config(alpha_pattern={"*q": 2}), "regular expression"),
    "target": (_config(target_modules=["k"]), "m.0.q has factors, but the configuration does not target it"),
    "dora without magnitude": (_config(use_dora=True), "no lora_magnitude_vector"),
    "no B": (_tensors(lambda t: t.pop(P + "m.0.q.lora_B.weight")), "m.0.q has lora_A but no lora_B"),
    "unknown": (
        _tensors(lambda t: t.update({P + "m.0.q.lora_C.weight": np.ones(1)})),
        "m.0.q.lora_C.weight (1,) would overwrite a base tensor",
    ),
    "stray base": (
        _tensors(lambda t: t.update({P + "lm_head.weight": np.ones(1)})),
        "lm_head.weight (1,) would",
    ),
    "stray bias": (_tensors(lambda t: t.update({P + "m.0.q.bias": np.ones(1)})), "m.0.q.bias (1,) would overwrite"),
    "prefix": (_tensors(lambda t: t.update({"x.lora_A.weight": np.ones((4, 2))})), "does not start with"),
    "adapter name": (
        _tensors(lambda t: t.update({P + "m.0.q.lora_A.default.weight": np.ones((4, 2))})),
        "lora_A.default.weight (4, 2) would overwrite",
    ),
    "ranks": (
        _tensors(lambda t: t.update({P + "m.0.q.lora_B.weight": np.ones((12, 3), np.float32)})),
        "lora_A (4, 10), lora_B (12, 3) do not agree on a rank",
    ),
    "dimensions": (
        _tensors(lambda t: t.update({P + "m.0.q.lora_B.weight": np.ones((12, 4, 3), np.float32)})),
        "lora_B (12, 4, 3) are no factors",
    ),
    "integers": (_tensors(lambda t: t.update({P + "m.0.q.lora_B.weight": np.ones((12, 4), int)})), "I64"),
    "empty": (_tensors(lambda t: t.clear()), "no tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(tmp_path, capsys, case):
    spoil, told = BAD[case]
    write(tmp_path, pair(np.random.default_rng(6)))
    inspected(tmp_path, capsys)  # accepted before
    spoil(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1, error
