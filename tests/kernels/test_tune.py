"""`tune` with a clock of its own: real kernels (of the reference family), real checks, a real file."""

from __future__ import annotations

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.cli import main
from lora_jax.kernels import mosaic_stages, stage, tuning_cache
from lora_jax.kernels.shape_class import class_of
from lora_jax.kernels.stage import Expected, Stage, product
from lora_jax.ops import explain, tune, tuning
from tests.core.harness import cast, config, normal, random_adapter
from tests.kernels import reference_kernels

SIZES = (48, 32, 24, 4)
SHAPE = class_of(*SIZES)


@dataclass(frozen=True)
class Tiles:
    width: int
    error: float = 0.0


@pytest.fixture
def family(tmp_path, monkeypatch):
    """The reference family with one kernel to tune, of which each candidate has an error; and the user's file."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuning_cache, "path", lambda: path)
    tuning_cache.reread()

    def set_up(*candidates):
        def stages(m, k, n, r, dtype, threshold):
            x, w = jnp.asarray(normal(m, k)), jnp.asarray(normal(k, n))

            def run(config, x, w):
                if config.width == 0:
                    raise ValueError("no width")
                return product(x, w) + config.error

            def expected(x, w):
                value = product(x, w)
                return Expected(value, jnp.full_like(value, 1e-3), value / 2)

            yield Stage("gemm", class_of(m, k, n, r, dropped=threshold > 0), candidates, run, expected, (x, w))

        monkeypatch.setattr(reference_kernels, "stages", stages, raising=False)
        return path

    with reference_kernels.installed():
        yield set_up


def clock(*readings):
    """Gives these seconds in turn, a list for each call, and keeps how many runs it was given."""
    left = list(readings)

    def timer(runs):
        for run in runs:
            jax.block_until_ready(run())
        seconds = left.pop(0)
        assert len(seconds) == len(runs)
        return seconds

    return timer


def test_the_fastest_right_candidate_is_kept(family):
    path = family(Tiles(1), Tiles(2), Tiles(3, error=1.0), Tiles(0), Tiles(4), Tiles(5, error=float("nan")))
    told: list[str] = []
    found = tune([SIZES], timer=clock([8e-3, 4e-3, 6e-3], [8e-3, 7e-3]), calls=2, report=told.append)
    assert found["cpu", "gemm", SHAPE]["config"] == {"width": 2, "error": 0.0}
    assert found["cpu", "gemm", SHAPE]["microseconds"] == {"best": 2000.0, "general": 4000.0}
    assert found["cpu", "implementation", SHAPE]["winner"] == "reference"
    left_out = [line for line in told if line.startswith("left out")]
    assert [line.split("width=")[1][0] for line in left_out] == ["3", "0", "5"]
    assert "its error is 1e+03 times the bound" in left_out[0] and "no width" in left_out[1] and "inf" in left_out[2]
    # This process still knows nothing of it; the next one does.
    assert json.loads(path.read_text())["schema"] == tuning_cache.SCHEMA
    assert tuning_cache.find("cpu", "gemm", SHAPE) is None
    tuning_cache.reread()
    assert tuning_cache.find("cpu", "gemm", SHAPE) == found["cpu", "gemm", SHAPE]


def test_the_winner_is_chosen_from_then_on(family):
    family(Tiles(1), Tiles(2))
    dot = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((48, 32), (32, 24), (32, 4), (4, 24))]
    # Tiles that are faster by less than measurements differ are not taken.
    found = tune([SIZES], timer=clock([1.0, 0.995], [1.0, 2.0]), calls=1, report=lambda _: None)
    assert found["cpu", "gemm", SHAPE]["config"]["width"] == 1 and found["cpu", "gemm", SHAPE]["general"]
    tune([SIZES], dropout_rate=0.25, timer=clock([1.0, 1.0], [2.0, 1.0]), calls=1, report=lambda _: None)
    assert explain(*dot).implementation == "reference"
    tuning_cache.reread()
    assert (
        explain(*dot).implementation == "xla" and "xla 1000000, reference 2000000" in explain(*dot).reasons["reference"]
    )
    assert explain(*dot, dropout_rate=0.25).implementation == "reference"


def test_wrong_results_are_not_timed(family, monkeypatch):
    path = family(Tiles(1, error=1.0))
    with pytest.raises(RuntimeError, match="reference's gemm fails with the tiles that ship, .*: its error is 1e"):
        tune([SIZES], timer=clock(), calls=1, report=lambda _: None)
    family(Tiles(1))
    right = reference_kernels.backward

    def wrong(*operands, **options):
        dx, da, db = right(*operands, **options)
        return dx, da, 0.9 * db

    monkeypatch.setattr(reference_kernels, "backward", wrong)
    with pytest.raises(RuntimeError, match=r"reference: the error of dB of \(48, 32, 24, 4\) is .* times its bound"):
        tune([SIZES], timer=clock([1.0]), calls=1, report=lambda _: None)
    assert not path.exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_are_ones_that_the_cast_leaves_alone(dtype):
    """Also where XLA makes nothing of a cast and one back, as it may in one program: their rounding has no bound."""
    sizes = (8, 64, 48, 16)
    assert "reduce_precision" in str(jax.make_jaxpr(tuning._operands, static_argnums=(0, 1))(sizes, dtype))
    *_, a, b = jax.jit(tuning._operands, static_argnums=(0, 1))(sizes, dtype)
    for factor in (a, b):
        assert factor.dtype == jnp.float32
        assert (factor.astype(dtype).astype(jnp.float32) == factor).all() and len(set(factor.ravel().tolist())) > 50


def test_a_wrong_result_is_told_from_a_right_one_at_large_sizes():
    """Of the whole product, where sums are over many rows and columns, and of each kernel."""
    operands = (*tuning._operands((8192, 64, 2048, 16), jnp.bfloat16), jax.random.key(2))
    for value, bound, mistake in jax.jit(lambda *v: list(tuning._expected(v, 0.05, jnp.bfloat16)))(*operands):
        assert stage.excess(mistake, value, bound) > 2
    for each in mosaic_stages.stages(64, 320, 14336, 16, jnp.bfloat16, 3277):
        value, bound, mistake = jax.jit(each.expected)(*each.operands)
        assert stage.excess(mistake, value, bound) > 2, each.kernel


def test_a_file_that_can_not_be_written_stops_it_before_it_measures(family):
    path = family(Tiles(1))
    path.write_text("{}")
    with pytest.raises(ValueError, match="would be overwritten, but it is no file of `lora-jax tune`"):
        tune([SIZES], timer=clock(), calls=1, report=lambda _: None)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        tune([SIZES], timer=clock(), calls=1, report=lambda _: None)


def test_of_a_model(family):
    def model(p, x):
        return jnp.tanh(x @ p["v"]) @ p["w"] + x @ p["v"]

    params, x = cast({"v": normal(32, 32), "w": normal(32, 32)}, jnp.bfloat16), cast(normal(2, 8, 32), jnp.bfloat16)
    plan = lj.plan(model, params, x, config=config())
    assert lj.explain(model, plan)(params, random_adapter(plan, jnp.float32), x).shapes == ((16, 32, 32, 3),)


def test_without_a_gpu():
    with pytest.raises(ValueError, match="for want of a supported GPU. mosaic_gpu: needs a Hopper GPU .* here is cpu"):
        tune([SIZES])


def test_command(capsys, tmp_path, family):
    assert main(["tune", "8192x4096"]) == 2
    assert "'8192x4096' is no shape; write M x K x N x R" in capsys.readouterr().err
    assert main(["tune", "48x32x24x4", "--dtype", "int8"]) == 2
    assert "--dtype is 'int8'" in capsys.readouterr().err
    family(Tiles(1))
    assert main(["tune", "48x32x24x4", "--calls", "1", "--log", str(tmp_path / "log.jsonl")]) == 0
    assert f"2 measurements are in {tuning_cache.path()}" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["tiles", "implementation"]
    assert lines[1]["winner"] in lines[1]["microseconds"] and lines[0]["shape"]["m"] == 64 and lines[0]["commit"]
