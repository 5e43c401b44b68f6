"""PEFT directories are written whole or not at all, and read back as they were."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_torch import load_peft, read_peft, save_peft
from tests.interop.peft_models import random_adapter
from tests.interop.peft_toy import CONFIG, PARAMS, TENSORS, P, X, edit_tensors, fn, key, plan_of
from tests.interop.peft_toy import directory as directory  # a fixture


def test_reads_back_what_was_written(directory: Path) -> None:
    config, tensors = read_peft(directory)
    assert config["target_modules"] == ["q", "v"] and config["inference_mode"] is True
    assert {k: v.shape for k, v in tensors.items()} == {
        key(i, p, f): (2, 4) if f == "A" else (6, 2) for i in range(2) for p in "qv" for f in "AB"
    }
    with open(directory / TENSORS, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_survive_and_transposed_memory_is_written_right(dtype: str, tmp_path: Path) -> None:
    plan = plan_of(dtype=dtype)
    adapter = random_adapter(plan)
    save_peft(adapter, tmp_path / "a", plan)
    tensors = load_file(tmp_path / "a" / TENSORS)
    a, b = (np.asarray(x) for x in adapter.factors(plan.sites[0]))
    assert tensors[key(0, "q", "A")].dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    assert np.array_equal(tensors[key(0, "q", "A")], a.T) and np.array_equal(tensors[key(0, "q", "B")], b.T)
    kept, planned = load_peft(tmp_path / "a", plan.sites), load_peft(tmp_path / "a", plan_of())
    assert {x.dtype.name for x in jax.tree.leaves(kept)} == {dtype}
    assert {x.dtype.name for x in jax.tree.leaves(planned)} == {"float32"}
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves(adapter), strict=True))


def test_dtypes_without_a_place_are_refused(directory: Path) -> None:
    narrow = plan_of(dtype="float8_e4m3fn")
    with pytest.raises(
        ValueError, match="PEFT reads float64, float32, float16, bfloat16, not float8_e4m3fn; cast first"
    ):
        save_peft(random_adapter(narrow), directory, narrow, overwrite=True)
    edit_tensors(directory, lambda t: t.update({k: v.astype(np.float64) for k, v in t.items()}))
    with pytest.raises(ValueError, match="`layers_0.q.lora_A.kernel`: jax keeps no float64.*pass `dtype='float32'`"):
        load_peft(directory, plan_of().sites)
    assert load_peft(directory, plan_of().sites, dtype="float32").sites == plan_of().sites


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_adapter_is_not_written(value, tmp_path):
    plan = plan_of()
    adapter = plan.init(jax.random.key(0))
    save_peft(adapter, tmp_path / "finite", plan)
    spoilt = [leaf.at[0, 0].set(value) if i == 1 else leaf for i, leaf in enumerate(jax.tree.leaves(adapter))]
    adapter = jax.tree.unflatten(jax.tree.structure(adapter), spoilt)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors hold NaN or infinite .*lora_[AB]\.weight.*diverged"):
        save_peft(adapter, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


def test_a_scale_that_leaves_the_range_of_float16_is_no_infinity(tmp_path: Path) -> None:
    plan = plan_of(alpha=2e5, dtype="float16")
    adapter = random_adapter(plan)
    with pytest.raises(ValueError, match=r"layers.0.q: lora_B times 100000 is beyond float16; use float32 factors"):
        save_peft(adapter, tmp_path / "a", plan, target="vllm")
    wide = jax.tree.map(lambda x: x.astype("float32"), adapter)
    directory = save_peft(wide, tmp_path / "a", plan, target="vllm")
    want = 1e5 * np.asarray(wide.factors(plan.sites[0])[1], np.float64).T
    assert np.allclose(load_file(directory / TENSORS)[key(0, "q", "B")], want, rtol=1e-6)


def test_copies_keep_more_precision_than_a_narrow_base_has(tmp_path: Path) -> None:
    """Trained in float32 beside a bfloat16 base: no bit is lost on the way back."""
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    config = lj.LoRAConfig(rank=2, target_modules=["q"], modules_to_save=["v"])
    plan = lj.plan(fn, base, X, config=config)
    adapter = random_adapter(plan)
    directory = save_peft(adapter, tmp_path / "a", plan)
    for what in (plan, plan.sites):
        back = load_peft(directory, what)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(back), strict=True))
    narrow = lj.plan(fn, base, X, config=config.replace(dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(load_peft(directory, narrow))} == {jnp.dtype("bfloat16")}


def test_overlapping_names_get_patterns_that_cannot_be_confused(tmp_path: Path) -> None:
    """`q` at the top level and `inner.q`: PEFT would take the pattern `q` for both."""
    params = {"q": {"kernel": jnp.ones((4, 6))}, "inner": {"q": {"kernel": jnp.ones((4, 6))}}}
    plan = lj.plan(
        lambda p, x: x @ p["q"]["kernel"] + x @ p["inner"]["q"]["kernel"],
        params,
        X,
        config=lj.LoRAConfig(rank=2, target_modules=["q"], rank_pattern={"^q": 5}, alpha_pattern={"^q": 3}),
    )
    assert {s.module: (s.rank, s.alpha) for s in plan.sites} == {"q": (5, 3), "inner.q": (2, 16)}
    directory = save_peft(random_adapter(plan), tmp_path / "a", plan)
    config, tensors = read_peft(directory)
    assert tensors[f"{P}q.lora_A.weight"].shape == (5, 4) and tensors[f"{P}inner.q.lora_A.weight"].shape == (2, 4)
    assert load_peft(directory, plan.sites).sites == plan.sites

    peft = pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    theirs = peft.LoraConfig(**config)
    for name, rank, alpha in (("q", 5, 3), ("inner.q", 2, 16)):
        assert theirs.rank_pattern.get(get_pattern_key(sorted(theirs.rank_pattern), name), theirs.r) == rank
        assert theirs.alpha_pattern.get(get_pattern_key(sorted(theirs.alpha_pattern), name), theirs.lora_alpha) == alpha


def test_sites_of_both_kinds_of_scale_are_written_as_one(tmp_path: Path) -> None:
    """PEFT's rsLoRA is a switch for all modules; alpha / rank says the same of each."""
    plan = plan_of(target_modules=["q"], rank=4)
    sites = (plan.sites[0], dataclasses.replace(plan.sites[1], alpha=6.0, rslora=True))
    adapter = lj.Adapter(random_adapter(plan).to_dict(), sites)
    config, _ = read_peft(save_peft(adapter, tmp_path / "a", plan))
    assert "use_rslora" not in config and config["alpha_pattern"] == {"layers.1.q": 12}
    assert [s.scale for s in load_peft(tmp_path / "a", plan.sites).sites] == [4.0, 3.0] == [s.scale for s in sites]


# Writing ----------------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_there_is_not_replaced_unasked(directory: Path) -> None:
    plan = plan_of(rank=3)
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    with pytest.raises(FileExistsError, match="pass `overwrite=True`"):
        save_peft(random_adapter(plan), directory, plan)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    (directory / "notes.txt").write_text("mine")
    save_peft(random_adapter(plan), directory, plan, overwrite=True)
    assert read_peft(directory)[0]["r"] == 3 and (directory / "notes.txt").read_text() == "mine"
    assert [p.name for p in directory.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_no_half_of_a_directory(tmp_path: Path, monkeypatch: Any, overwrite: bool) -> None:
    plan = plan_of()
    target = tmp_path / "a"
    if overwrite:
        save_peft(random_adapter(plan), target, plan)
    before = {p.name: p.read_bytes() for p in target.iterdir()} if overwrite else None
    monkeypatch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_peft(random_adapter(plan, seed=1), target, plan, overwrite=overwrite, model_card=False)
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if overwrite else [])
    if overwrite:
        assert {p.name: p.read_bytes() for p in target.iterdir()} == before


def test_a_failure_between_two_files_puts_the_old_ones_back(directory: Path, monkeypatch: Any) -> None:
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    move, adapter = os.replace, random_adapter(plan_of(), seed=1)
    for failing in range(6):
        moves = iter(range(100))

        def fail(source: Any, target: Any, moves: Any = moves, failing: int = failing) -> None:
            if next(moves) == failing:
                raise OSError("disk full")
            move(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_peft(adapter, directory, plan_of(), overwrite=True)
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    assert next(moves) == 6 + 3, "three files out, three in, and three back"


def test_links_and_paths(tmp_path: Path) -> None:
    plan, real = plan_of(), tmp_path / "a b"
    for name, there in (("to nothing yet", False), ("to an empty directory", True)):
        link, real = tmp_path / name, tmp_path / f"of {name}"
        link.symlink_to(real)
        if there:
            real.mkdir()
        save_peft(random_adapter(plan), str(link), plan, base_model_name_or_path=tmp_path / "base model")
        assert link.is_symlink() and sorted(p.name for p in real.iterdir()) == ["README.md", CONFIG, TENSORS]
        assert read_peft(link)[0]["base_model_name_or_path"] == str(tmp_path / "base model")


def test_sites_without_a_name_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    params = {"kv": {"w": jnp.ones((2, 3, 4, 5))}, "experts": {"kernel": jnp.ones((3, 5, 4))}}

    def stacked(p: Any, x: Any) -> Any:
        k, v = (jnp.einsum("bd,ndh->bnh", x, p["kv"]["w"][i]) for i in range(2))
        return k.sum() + v.sum() + jnp.einsum("ebd,edf->ebf", jnp.ones((3, 2, 5)), p["experts"]["kernel"]).sum()

    plan = lj.plan(stacked, params, X, config=lj.LoRAConfig(rank=2, target_modules=["kv", "experts"]))
    with pytest.raises(ValueError) as error:
        save_peft(random_adapter(plan), tmp_path / "a", plan)
    for part in (
        "`kv.w` (2, 3, 4, 5) stacks weights along axis 0 of length 2",
        "Rule('kv.w', to=(name, name, …)",
        "`experts.kernel` (3, 5, 4) stacks weights along axis 0 of length 3",
    ):
        assert part in str(error.value), str(error.value)
    assert not (tmp_path / "a").exists()


def test_model_card(tmp_path: Path) -> None:
    plan = plan_of(rank_pattern={"layers.0.q": 4})
    name = 'somebody/a "model": [1]'
    adapter = random_adapter(plan)
    directory = save_peft(adapter, tmp_path / "a", plan, base_model_name_or_path=name, task_type="CAUSAL_LM")
    card = (directory / "README.md").read_text()
    front = card.split("---\n")[1]
    assert f"base_model: {json.dumps(name)}" in front and "library_name: peft" in front
    assert "| Rank | 2 |" in card and "| Adapted modules | 4 |" in card and f"{adapter.count():,}" in card
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(front) == {
        "base_model": name,
        "library_name": "peft",
        "tags": ["lora", "jax", "lora-jax"],
    }
    save_peft(adapter, directory, plan, model_card="# Mine\n", overwrite=True)
    assert (directory / "README.md").read_text() == "# Mine\n"
    save_peft(adapter, tmp_path / "b", plan, model_card=False)
    assert not (tmp_path / "b" / "README.md").exists()


def test_torch_is_not_needed(directory: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
import jax.numpy as jnp
from lora_torch import load_peft, plan_peft, read_peft, save_peft
from tests.interop.peft_toy import PARAMS, X, fn
plan = plan_peft({str(directory)!r}, fn, PARAMS, X)
save_peft(load_peft({str(directory)!r}, plan), {str(directory.parent / "again")!r}, plan)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    one, two = (load_file(d / TENSORS) for d in (directory, directory.parent / "again"))
    assert all(np.array_equal(one[k], two[k]) for k in one) and set(one) == set(two)
