"""`lora-jax combine` and `extract` against dense float64 arithmetic, read back from what they wrote."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from lora_jax.cli import main
from tests.cli.test_diff import dense, pair, write


def read(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    return {k.removeprefix("base_model.model."): v for k, v in tensors.items()}, config


def test_combine_by_cat(tmp_path, capsys):
    rng = np.random.default_rng(0)
    conv = {
        "l.0.c.lora_A.weight": rng.standard_normal((4, 3, 2, 2)),
        "l.0.c.lora_B.weight": rng.standard_normal((5, 4, 1, 1)),
    }
    table = {"emb.lora_embedding_A": rng.standard_normal((4, 9)), "emb.lora_embedding_B": rng.standard_normal((6, 4))}
    more = {k: v.astype(np.float32) for k, v in (conv | table).items()}
    one = pair(rng, "l.0.q") | more
    two = pair(rng, "l.0.q", r=3) | pair(rng, "l.0.v", r=3)
    names = {"target_modules": ["q", "v", "c", "emb"]}
    first = write(tmp_path / "1", one, base_model_name_or_path="base", task_type="CAUSAL_LM", **names)
    second = write(tmp_path / "2", two, r=3, lora_alpha=5, use_rslora=True, base_model_name_or_path="other")
    out = tmp_path / "out"
    assert main(["combine", str(out), f"[{first}, {second}]", "--weights", "[0.5, -2]"]) == 0
    printed = capsys.readouterr().out
    assert "combined 2 adapters in 4 modules, of rank 3, 4, 7" in printed and "base, other" in printed
    tensors, config = read(out)
    s1, s2 = 0.5 * 2, -2 * 5 / 3**0.5
    want = dense(one, "l.0.q", s1) + dense(two, "l.0.q", s2)
    np.testing.assert_allclose(dense(tensors, "l.0.q", 1), want, atol=1e-5)
    assert abs(dense(one, "l.0.q", s1) - want).max() > 0.1
    np.testing.assert_allclose(dense(tensors, "l.0.v", 1), dense(two, "l.0.v", s2), atol=1e-5)
    for a, b in (("c.lora_A.weight", "c.lora_B.weight"),):
        got, old = (np.einsum("or,r...->o...", t[f"l.0.{b}"][:, :, 0, 0], t[f"l.0.{a}"]) for t in (tensors, one))
        np.testing.assert_allclose(got, s1 * old, atol=1e-5)
    got, old = (t["emb.lora_embedding_B"] @ t["emb.lora_embedding_A"] for t in (tensors, one))
    np.testing.assert_allclose(got, s1 * old, atol=1e-5)
    assert config["task_type"] == "CAUSAL_LM" and config["base_model_name_or_path"] == "base"
    for name in ("l.0.q", "l.0.v", "l.0.c", "emb"):
        rank = config["rank_pattern"].get(name, config["r"])
        assert config["alpha_pattern"].get(name, config["lora_alpha"]) == rank
    assert not config.get("use_rslora")


def test_combine_refuses(tmp_path, capsys):
    rng = np.random.default_rng(1)
    one = write(tmp_path / "1", pair(rng, "l.0.q"))
    saved = write(
        tmp_path / "2", pair(rng, "l.0.q") | {"score.weight": np.ones((2, 3), np.float32)}, modules_to_save=["score"]
    )
    out = str(tmp_path / "out")
    for words, says in (
        ([f"[{one}, {saved}]"], "holds score.weight: no weighted sum of factors"),
        ([f"[{one}]", "--method", "ties"], "needs `density`"),
        ([f"[{one}]", "--weights", "[1, 2]"], "1 adapters and 2 weights"),
    ):
        assert main(["combine", out, *words]) == 2
        assert says in capsys.readouterr().err
    assert main(["combine", one, f"[{one}]"]) == 2 and "exists already" in capsys.readouterr().err


def base_dir(directory, tensors, **config):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    stored = {k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()}
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


def test_extract(tmp_path, capsys):
    """A merged adapter comes out again, for layers stored (out, in) and, as GPT-2's, (in, out)."""
    rng = np.random.default_rng(2)
    for kind in ("llama", "gpt2"):
        name = "h.0.c_attn" if kind == "gpt2" else "layers.0.q_proj"
        change = pair(rng, name, m=12, n=10, r=3)
        delta = dense(change, name, 1.0)
        base = {f"{name}.weight": rng.standard_normal((12, 10)), "norm.weight": rng.standard_normal(10)}
        base[f"{name}.weight"] = base[f"{name}.weight"].T if kind == "gpt2" else base[f"{name}.weight"]
        tuned = {**base, f"{name}.weight": base[f"{name}.weight"] + (delta.T if kind == "gpt2" else delta)}
        first = base_dir(tmp_path / f"{kind}-base", base, model_type=kind)
        second = base_dir(tmp_path / f"{kind}-tuned", tuned, model_type=kind)
        out = tmp_path / f"{kind}-out"
        target = name.rpartition(".")[2]
        assert main(["extract", first, second, str(out), f"[{target}]", "--rank", "4", "--alpha", "8"]) == 0
        assert "rank 4 holds 100.0% to 100.0%" in capsys.readouterr().out
        tensors, config = read(out)
        np.testing.assert_allclose(dense(tensors, name, 2.0), delta, atol=1e-4)
        assert np.abs(delta).max() > 1
        assert config["target_modules"] == [target] and bool(config.get("fan_in_fan_out")) == (kind == "gpt2")
    moved = base_dir(tmp_path / "moved", {**tuned, "norm.weight": tuned["norm.weight"] + 1}, model_type="gpt2")
    words = ["extract", first, moved, str(tmp_path / "no")]
    assert main([*words, "[c_attn]"]) == 2
    assert "`norm.weight` differ between the two models" in capsys.readouterr().err
    assert main([*words, "[c_attn]", "--partial", "--rank", "4"]) == 0
    capsys.readouterr()
    assert main([*words[:3], str(tmp_path / "no2"), "[qkv]"]) == 2 and "has no module qkv" in capsys.readouterr().err
