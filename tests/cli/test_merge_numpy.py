"""`lora-jax merge` where there is no torch: against float64 products, and within one shard's memory."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.cli import main
from lora_jax.cli._shards import parse_size, plan_shards
from lora_jax.cli.merge import merge_directories

pytestmark = pytest.mark.pinned


def write_pair(path, rng, shards=8, per_shard=4, size=512):
    """A sharded base of square float32 matrices and an adapter of rank 2, scale 1.5, of every one of them."""
    (path / "base").mkdir()
    (path / "adapter").mkdir()
    weight_map, factors, base = {}, {}, {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"m.{i}.{j}.q" for j in range(per_shard)]
        content = {f"{name}.weight": rng.standard_normal((size, size), np.float32) for name in names}
        save_file(content, path / "base" / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, shard)
        base |= content
        for name in names:
            factors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((2, size), np.float32)
            factors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((size, 2), np.float32)
    (path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "base" / "config.json").write_text("{}")
    save_file(factors, path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q"]}
    (path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return base, factors


def test_float64_oracle(tmp_path, capsys):
    base, factors = write_pair(tmp_path, np.random.default_rng(0), 2, 2, 33)
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 0
    squares = 0.0
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        for name, value in load_file(shard).items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            b, a = (factors[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "BA")
            change = 1.5 * b @ a
            squares += np.sum(change**2)
            want = base[name] + change
            # Four float32 roundings: two products, their sum, the sum with the base.
            bound = 4 * 2.0**-24 * (np.abs(base[name]) + 1.5 * np.abs(b) @ np.abs(a))
            assert np.all(np.abs(value - want) <= bound)
            assert np.any(np.abs(base[name] + b @ a - want) > bound) and np.any(np.abs(change) > bound)
    assert f"4 tensors changed by {squares**0.5:.4g}" in capsys.readouterr().out


def test_memory_is_one_shard(tmp_path):
    write_pair(tmp_path, np.random.default_rng(0))  # eight shards of four 1 MiB tensors
    tracemalloc.start()
    report = merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(report.tensors) == 32 and len(report.shards) == 8
    # A shard (4 MiB), one tensor's temporaries, the factors and the reader's buffers; never all 32 MiB.
    assert peak < 12e6


@pytest.mark.parametrize(
    "text, size",
    [("7", 7), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2 * 2**20), ("3b", 3), ("1TB", 10**12)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 gigabytes", "0", "0.1"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_shards_are_filled_in_order():
    sizes = {name: ("old", n) for name, n in [("a", 5), ("b", 5), ("c", 1), ("d", 20), ("e", 2)]}
    assert plan_shards(sizes, None) == {"old": list("abcde")}
    assert list(plan_shards(sizes, 10).values()) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert plan_shards(sizes, 33) == {"model.safetensors": list("abcde")}
