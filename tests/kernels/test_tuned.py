"""Where tiles and implementations come from: the user's measurements, then ours, then the general ones."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tuned_rows as rows_of_results
from lora_jax.kernels import mosaic_lora, tuned, tuned_rows, tuning_cache
from lora_jax.kernels.gemm_config import GemmConfig, padded_rank, unsupported
from lora_jax.kernels.shape_class import ShapeClass, class_of
from lora_jax.ops import explain
from tests.kernels import reference_kernels

H100, SHAPE = "NVIDIA H100 80GB HBM3", (8192, 4096, 4096, 16)
OTHER = replace(GemmConfig(), width=16)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_cache, "path", lambda: tmp_path / "new" / "tuned.json")
    tuning_cache.reread()
    return tmp_path / "new" / "tuned.json"


def tiles(config=OTHER, device=H100, shape=SHAPE, **options):
    content = {"config": dict(tuned.tiles_of(config)), "microseconds": {"best": 1.0}, **about()}
    return {(device, "mosaic_gemm", class_of(*shape, **options)): content}


def race(winner, device=H100, **times):
    content = {"winner": winner, "microseconds": times, **about()}
    return {(device, "implementation", class_of(64, 128, 192, 4)): content}


def about():
    return {"kernels": tuning_cache.kernels(), "date": "2026-01-01"}


def store(*entries):
    for each in entries:
        tuning_cache.store(each)
    tuning_cache.reread()


def test_rows_are_those_of_the_results():
    """Each row cites a line that exists, no line is forgotten, and the tiles are ones that the kernel takes."""
    path = Path(tuned_rows.__file__)
    assert path.read_text() == rows_of_results.module(), f"run `python {rows_of_results.__file__} --write {path}`"
    lines = [
        (line["gpu"], *(line[name] for name in "mknr"), line["commit"], line["ratio"])
        for file in ("kernels.jsonl", "triton.jsonl")
        for line in map(json.loads, (rows_of_results.RESULTS / file).read_text().splitlines())
    ]
    for each in (*tuned_rows.RACES["mosaic_gpu"], *tuned_rows.RACES["triton"]):
        for ratio in (each.xla, each.kernels):
            assert (*each[:5], each.commit, ratio) in lines
    for each in tuned_rows.TILES:
        shape = ShapeClass(**each.shape)
        if each.kernel == "mosaic_gemm":
            config = GemmConfig(**each.config)
            assert unsupported(shape.m, shape.k, shape.n, shape.rank, config, masked=shape.dropped) is None


def test_the_nearest_measurement_decides():
    def slower(m, k, n, r=16, dropped=False, device=H100):
        return tuned.slower("mosaic_gpu", m, k, n, r, dropped, device)

    for each in tuned_rows.RACES["mosaic_gpu"]:
        assert (slower(*each[1:6], each.device) is None) == (each.kernels < each.xla)
    assert slower(4096, 8192, 8192, 64, True) is slower(8192, 4096, 4096, device="NVIDIA H200") is None
    with reference_kernels.pretending(H100):
        struct = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8192, 4096), (4096, 4096), (4096, 128), (128, 4096))]
        won = explain(*struct).reasons["xla"]  # of another rank than any that was measured
        assert won == tuned.faster("mosaic_gpu", 8192, 4096, 4096, 128, False, H100)
        assert "XLA took 1.25 and the kernels 1.13 times" in won and f"R=64 on {H100}" in won
        assert "was asked for" in explain(*struct, implementation="mosaic_gpu").reasons["xla"]
    told = slower(200, 4096, 4096)
    assert "XLA took 1.38 and the kernels 2.26 times" in told and f"M=256, K=4096, N=4096, R=16 on {H100}" in told
    # The nearest sizes count for more than the very device, which decides between equal ones.
    assert f"M=512, K=4096, N=14336, R=16 on {H100}" in slower(512, 4096, 14336, device="NVIDIA H200")
    assert "R=16 on NVIDIA H200" in slower(256, 4096, 4096, device="NVIDIA H200")


def test_sizes_that_would_be_padded_are_named():
    told = mosaic_lora.slower(8192, 4096, 4100, 16, jnp.bfloat16, False, H100)
    assert told == "N=4100 is no multiple of 64: the operands would be copied to pad them"
    told = mosaic_lora.slower(8190, 100, 4096, 16, jnp.bfloat16, False, H100)
    assert told.startswith("M=8190 is no multiple of 8, K=100 is no multiple of 64:")


def test_kernels_for_several_chips_are_judged_on_the_device_itself():
    for each in tuned_rows.RACES["triton"]:
        assert (tuned.slower("triton", *each[1:6], each.device) is None) == (each.kernels < each.xla)
    with pytest.raises(LookupError):
        tuned.slower("triton", 8192, 4096, 4096, 16, False, "NVIDIA A100-SXM4-80GB")


def test_candidates_begin_with_the_general_tiles_and_are_supported():
    for m, k, n, r in (SHAPE, (256, 448, 576, 200), (8192, 4096, 14336, 64)):
        for dropped in (False, True):
            found = tuned.gemm_candidates(m, k, n, r, dropped=dropped)
            assert found[0] == tuned.gemm_config(m, k, n, r, dropped=dropped) and len(set(found)) == len(found) > 3
            assert all(unsupported(m, k, n, padded_rank(r), each, masked=dropped) is None for each in found)
        for candidates, chosen in (
            (tuned.down_candidates(m, k, r, 132), tuned.down_config(m, k, r, 132)),
            (tuned.outer_candidates(m, k, r, 132), tuned.outer_config(m, k, r, 132)),
        ):
            assert candidates[0] == chosen and len(set(candidates)) == len(candidates)


def test_the_users_tiles_come_first(file):
    store(tiles(), tiles(replace(OTHER, minor="n"), transposed=True))
    assert json.loads(file.read_text())["schema"] == 1 and [p.name for p in file.parent.iterdir()] == ["tuned.json"]
    assert tuned.gemm_config(*SHAPE) == GemmConfig()  # of another device, a CPU
    with reference_kernels.pretending(H100):
        assert tuned.gemm_config(*SHAPE) == OTHER
        assert tuned.gemm_config(8000, 4096, 4096, 3) == OTHER  # of the same class
        assert tuned.gemm_config(4096, 4096, 4096, 16) == tuned.gemm_config(*SHAPE[:3], 17) == GemmConfig()
        assert tuned.gemm_config(*SHAPE, dropped=True) == GemmConfig()
        # The first of two other kinds of tiles is one that no general tiles lead to, the second one too large.
        for alien in (GemmConfig(width=7), replace(OTHER, stages=9)):
            store(tiles(alien))
            assert tuned.gemm_config(*SHAPE) == GemmConfig()
        store(tiles())
        assert tuned.gemm_config(*SHAPE) == OTHER
    with reference_kernels.pretending("NVIDIA H200"):
        assert tuned.gemm_config(*SHAPE) == GemmConfig()


def test_a_process_reads_the_file_once(file):
    with reference_kernels.pretending(H100):
        assert tuned.gemm_config(*SHAPE) == GemmConfig()
        tuning_cache.store(tiles())
        assert tuned.gemm_config(*SHAPE) == GemmConfig()
        with tuning_cache.trying(tiles(GemmConfig(delay=0))):
            assert tuned.gemm_config(*SHAPE) == GemmConfig(delay=0)
        tuning_cache.reread()
        assert tuned.gemm_config(*SHAPE) == OTHER


def test_other_kernels_measurements_do_not_count(file, monkeypatch):
    store(tiles())
    monkeypatch.setattr(tuning_cache, "kernels", lambda: "others")
    tuning_cache.reread()
    with reference_kernels.pretending(H100):
        assert tuned.gemm_config(*SHAPE) == GemmConfig()


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda text: text[:-30], "it is no JSON"),
        (lambda text: "[" * 200_000, "it is no JSON"),
        (lambda text: "[1]", "it is no file of `lora-jax tune`"),
        (
            lambda text: text.replace('"schema": 1', '"schema": 2'),
            "its schema is 2, and this version of lora-jax reads 1",
        ),
        (lambda text: text.replace('"m": 8192', '"m": "8192"'), "its entry 0 is damaged"),
        (lambda text: text.replace('"rank"', '"ranks"'), "its entry 0 is damaged"),
        (lambda text: text.replace('"best": 1.0', '"best": -1.0'), "its entry 0 is damaged"),
    ],
)
def test_a_damaged_file_is_named_and_not_used(file, spoil, told):
    store(tiles())
    file.write_text(spoil(file.read_text()))
    tuning_cache.reread()
    with reference_kernels.pretending(H100), pytest.warns(tuning_cache.TuningCacheWarning, match=told) as found:
        assert tuned.gemm_config(*SHAPE) == tuned.gemm_config(*SHAPE) == GemmConfig()
    assert len(found) == 1 and str(file) in str(found[0].message)
    before = file.read_text()
    with pytest.raises(ValueError, match="would be overwritten, but it"):
        tuning_cache.store(tiles())
    assert file.read_text() == before


def test_the_users_winner_comes_first_and_is_explained(file):
    struct = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 128), (128, 192), (128, 4), (4, 192))]
    few = [jax.ShapeDtypeStruct((2, *s.shape[1:]) if i == 0 else s.shape, s.dtype) for i, s in enumerate(struct)]
    with reference_kernels.installed():
        assert explain(*struct).implementation == "reference" and explain(*few).implementation == "xla"
        store(race("xla", "cpu", xla=20.0, reference=30.0))
        found = explain(*struct)
        assert found.implementation == "xla"
        assert found.reasons["reference"] == f"microseconds measured for such sizes: xla 20, reference 30 ({file})"
        assert explain(*struct, implementation="reference").implementation == "reference"
        assert explain(*struct, dropout_rate=0.1).implementation == "reference"  # not measured
        store(
            {
                ("cpu", "implementation", class_of(2, 128, 192, 4)): race(
                    "reference", xla=9.0, reference=7.0
                ).popitem()[1]
            }
        )
        found = explain(*few)
        assert found.implementation == "reference" and "reference 7, xla 9" in found.reasons["xla"]


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "a"))
    assert tuning_cache.path() == tmp_path / "a" / "tuned.json"
    monkeypatch.delenv("LORA_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_cache.path() == tmp_path / "lora_jax" / "tuned.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert tuning_cache.path() == Path.home() / ".cache" / "lora_jax" / "tuned.json"


def test_classes():
    assert class_of(8000, 3000, 0, 5) == ShapeClass(8192, 4096, 0, 16)
    assert asdict(class_of(1, 11008, 5120, 65, dropped=True)) == {
        "m": 1, "k": 8192, "n": 4096, "rank": 128, "dropped": True, "transposed": False,
    }  # fmt: skip


def test_without_a_home_nothing_is_known(monkeypatch):
    """As in a container whose user has no name there: products run all the same, and storing says what is missing."""
    monkeypatch.undo()
    for name in ("LORA_JAX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987654)
    tuning_cache.reread()
    with pytest.warns(tuning_cache.TuningCacheWarning, match="Set LORA_JAX_CACHE or HOME to a folder"):
        assert tuning_cache.find(H100, "mosaic_gemm", class_of(*SHAPE)) is None
    with pytest.raises(OSError, match="home directory"):
        tuning_cache.store(tiles())
