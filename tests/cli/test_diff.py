"""`lora-jax diff` against dense float64 products."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.cli import main

pytestmark = pytest.mark.pinned


def write(directory, tensors, **config):
    directory.mkdir()
    known = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
    (directory / "adapter_config.json").write_text(json.dumps({**known, **config}))
    # save_file writes the raw memory of strided arrays.
    stored = {f"base_model.model.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(stored, directory / "adapter_model.safetensors")
    return str(directory)


def pair(rng, name, m=12, n=10, r=4) -> dict[str, np.ndarray]:
    a, b = rng.standard_normal((r, n)), rng.standard_normal((m, r))
    return {f"{name}.lora_A.weight": a.astype(np.float32), f"{name}.lora_B.weight": b.astype(np.float32)}


def dense(tensors, name, scaling):
    b, a = (tensors[f"{name}.lora_{x}.weight"].astype(np.float64) for x in "BA")
    return scaling * b @ a


def compared(one, two, capsys):
    assert main(["diff", one, two, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_matches_dense_products(tmp_path, capsys):
    rng = np.random.default_rng(0)
    one = pair(rng, "l.0.q") | pair(rng, "l.0.v", 6)
    two = pair(rng, "l.0.q", r=3) | pair(rng, "l.0.v", 6, r=3)  # another rank
    result = compared(
        write(tmp_path / "1", one), write(tmp_path / "2", two, r=3, lora_alpha=5, use_rslora=True), capsys
    )
    scale1, scale2 = 2.0, 5 / 3**0.5
    rows = {row["module"]: row for row in result["modules"]}
    flat1, flat2 = [], []
    for name in ("l.0.q", "l.0.v"):
        d1, d2 = dense(one, name, scale1), dense(two, name, scale2)
        cosine = np.sum(d1 * d2) / np.linalg.norm(d1) / np.linalg.norm(d2)
        relative = np.linalg.norm(d1 - d2) / np.linalg.norm(d1)
        assert rows[name]["cosine"] == pytest.approx(cosine, abs=1e-9)
        assert rows[name]["relative"] == pytest.approx(relative, rel=1e-9)
        # A forgotten scale changes the relative difference.
        wrong = np.linalg.norm(d1 - d2 / scale2) / np.linalg.norm(d1)
        assert rows[name]["relative"] != pytest.approx(wrong, rel=1e-3)
        flat1.append(d1.ravel())
        flat2.append(d2.ravel())
    x, y = np.concatenate(flat1), np.concatenate(flat2)
    assert result["total"]["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-9)
    assert result["total"]["relative"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-9)
    assert result["config"] == {"r": [4, 3], "lora_alpha": [8, 5], "use_rslora": [None, True]}


def test_another_factorisation_is_the_same_update(tmp_path, capsys):
    """B R^-1 and R A make the same product, whatever the factors look like; a tiny change is still measured."""
    rng = np.random.default_rng(1)
    one = pair(rng, "l.0.q")
    two = {k: v.copy() for k, v in one.items()}
    order = rng.permutation(4)
    two["l.0.q.lora_A.weight"] = 4 * two["l.0.q.lora_A.weight"][order]  # powers of two: exact
    two["l.0.q.lora_B.weight"] = two["l.0.q.lora_B.weight"][:, order] / 4
    three = {k: v.copy() for k, v in one.items()}
    three["l.0.q.lora_B.weight"] *= np.float32(1 + 2**-20)
    names = [write(tmp_path / n, t) for n, t in (("1", one), ("2", two), ("3", three))]
    row = compared(names[0], names[1], capsys)["modules"][0]
    assert row["relative"] < 1e-14 and row["cosine"] == pytest.approx(1, abs=1e-14)
    d1, d3 = dense(one, "l.0.q", 2.0), dense(three, "l.0.q", 2.0)
    row = compared(names[0], names[2], capsys)["modules"][0]
    assert row["relative"] == pytest.approx(np.linalg.norm(d1 - d3) / np.linalg.norm(d1), rel=1e-6)


def test_only_in_one_and_other_tensors(tmp_path, capsys):
    rng = np.random.default_rng(2)
    saved = {"score.weight": np.full((3, 4), 2, np.float32)}
    one = pair(rng, "l.0.q") | pair(rng, "l.1.q") | saved
    two = pair(rng, "l.0.q", n=11) | pair(rng, "l.2.v") | {"score.weight": np.full((3, 4), 3, np.float32)}
    keep = {"modules_to_save": ["score"]}
    first, second = write(tmp_path / "1", one, **keep), write(tmp_path / "2", two, **keep)
    result = compared(first, second, capsys)
    assert result["only_in_first"] == ["l.1.q"] and result["only_in_second"] == ["l.2.v"]
    assert result["other_tensors"] == [{"name": "score.weight", "relative": 0.5, "note": ""}]
    assert result["modules"][0]["cosine"] is None and "(4, 11)" in result["modules"][0]["note"]
    assert result["config"] == {}
    assert main(["diff", first, second]) == 0
    out = capsys.readouterr().out
    assert "only in 1: l.1.q" in out and "only in 2: l.2.v" in out and "also score.weight" in out


def test_zero_updates(tmp_path, capsys):
    rng = np.random.default_rng(3)
    one = pair(rng, "l.0.q") | pair(rng, "l.1.q")
    two = {k: v.copy() for k, v in one.items()}
    for tensors in (one, two):
        tensors["l.0.q.lora_B.weight"][:] = 0
    two["l.1.q.lora_B.weight"][:] = 0
    result = compared(write(tmp_path / "1", one), write(tmp_path / "2", two), capsys)
    both, gone = result["modules"]
    assert both["relative"] == 0 and both["cosine"] is None
    assert gone["relative"] == pytest.approx(1) and gone["cosine"] is None
    assert result["total"]["relative"] == pytest.approx(1)


def test_refuses_what_inspect_refuses(tmp_path, capsys):
    rng = np.random.default_rng(4)
    good = write(tmp_path / "1", pair(rng, "l.0.q"))
    bad = write(tmp_path / "2", pair(rng, "l.0.k"))
    assert main(["diff", good, bad]) == 2
    assert "l.0.k has factors, but the configuration does not target it" in capsys.readouterr().err
