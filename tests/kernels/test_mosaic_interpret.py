"""The Hopper kernels under Pallas' GPU interpreter, on a CPU: tiny sizes, each way to cut and share the work."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax import reference
from lora_jax.kernels import mosaic_group, mosaic_lora
from lora_jax.kernels.gemm_config import GemmConfig, in_ring
from lora_jax.kernels.mosaic_down import DownConfig, down
from lora_jax.kernels.mosaic_gemm import gemm
from lora_jax.kernels.mosaic_outer import OuterConfig, outer
from lora_jax.kernels.mosaic_stages import stages
from lora_jax.kernels.stage import excess
from tests.kernels.problems import BF16, F16, GroupProblem, Problem, mask, normal, seed_words

INTERPRET = plgpu.InterpretGPUParams()
THRESHOLD = 26214  # 40 % dropped: a forgotten mask shows
Gemm = functools.partial(GemmConfig, tile_m=64, tile_n=64, stages=2, cluster="")


def check(got, want, magnitude, terms, dtype, mistakes):
    """Within the bound, and no mistake is."""
    bound = reference.tolerance(dtype, terms) * magnitude
    assert reference.excess(got, want, bound) <= 1
    for name, wrong in mistakes.items():
        assert reference.excess(wrong, want, bound) > 1, name


def drop_options(masked, origin=(0, 0)):
    return {"seed": jnp.asarray(seed_words(origin=origin)), "threshold": THRESHOLD} if masked else {}


def wide(*arrays):
    return (array.astype(np.float64) for array in arrays)


@pytest.mark.parametrize(
    "m, k, n, rank, config, transposed, masked, biased, dtype",
    [
        # Two turns for a CTA, a tail of its own, a shared operand; ragged rows, a bias cut by the last tile.
        (184, 192, 192, 16, Gemm(cluster="n"), False, False, np.float32, BF16),
        (128, 192, 128, 16, Gemm(split="n", cluster="m", delay=0), False, True, None, F16),
        # Two turns for each of the teams.
        (128, 192, 256, 16, Gemm(split="", cluster="m"), True, False, None, BF16),
        (120, 256, 192, 128, Gemm(split="", stages=3, store_n=64), True, True, None, BF16),
        (128, 192, 128, 64, Gemm(split="n"), True, False, F16, F16),
        (128, 192, 192, 16, Gemm(tile_n=128), True, True, BF16, BF16),
        (136, 192, 128, 64, Gemm(store_n=64), False, True, None, BF16),
    ],
)
def test_gemm(m, k, n, rank, config, transposed, masked, biased, dtype):
    x, w = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype, spread=k**-0.5, seed=1)
    thin, tail = normal(m, rank, dtype=dtype, seed=2), normal(rank, n, dtype=dtype, seed=3)
    operands = (
        x,
        w.T.copy() if transposed else w,
        thin if in_ring(rank) else thin.T.copy(),
        tail.T.copy() if transposed and in_ring(rank) else tail,
    )
    bias = None if biased is None else normal(n, dtype=biased, seed=4)
    got = gemm(*operands, config, transposed=transposed, bias=bias, sms=2, interpret=INTERPRET, **drop_options(masked))

    x, w, thin, tail = wide(x, w, thin, tail)
    base, low = x @ w, thin @ tail
    kept = mask((m, n), THRESHOLD) if masked else 1.0
    want, magnitude = base + kept * low, abs(x) @ abs(w) + kept * (abs(thin) @ abs(tail))
    mistakes = {"no tail": base, "half the tail": base + kept * low / 2, "no product": kept * low}
    if masked:
        mistakes |= {"no mask": base + low, "all masked": kept * (base + low)}
    if bias is not None:
        bias = bias.astype(np.float64)
        mistakes = {name: wrong + bias for name, wrong in mistakes.items()} | {"no bias": want, "two": want + 2 * bias}
        want, magnitude = want + bias, magnitude + abs(bias)
    check(got, want, magnitude, k + rank, dtype, mistakes)


@pytest.mark.parametrize(
    "m, k, rank, config, masked",
    [
        (72, 320, 16, DownConfig(stages=4, depth=64), True),
        (128, 192, 64, DownConfig(stages=2, depth=64, workers=1), False),
        (64, 384, 16, DownConfig(stages=4, depth=128, splits=2), True),
    ],
)
def test_down(m, k, rank, config, masked):
    x, a = normal(m, k), normal(k, rank, spread=k**-0.5, seed=1)
    got = down(x, a.T.copy(), config, interpret=INTERPRET, **drop_options(masked))
    got = np.asarray(got if in_ring(rank) else got.T)
    assert got.shape[0] % 64 == 0 and not got[m:].any()
    x, a = wide(x, a)
    kept = mask(x.shape, THRESHOLD) if masked else 1.0
    mistakes = {"half": (kept * x) @ a / 2, "a shorter sum": (kept * x)[:, 64:] @ a[64:]}
    if masked:
        mistakes |= {"no mask": x @ a, "not rescaled": (1.0 * (kept > 0) * x) @ a}
    check(got[:m], (kept * x) @ a, (kept * abs(x)) @ abs(a), k, BF16, mistakes)


@pytest.mark.parametrize(
    "m, k, rank, config, masked",
    [
        (200, 192, 16, OuterConfig(stages=4, splits=2), True),
        (136, 128, 64, OuterConfig(columns=64, stages=2, workers=1, splits=1), False),
    ],
)
def test_outer(m, k, rank, config, masked):
    x, g, dy, h = normal(m, k), normal(m, rank, seed=1), normal(m, 64, seed=2), normal(m, rank, seed=3)

    def thin(values):
        padded = np.pad(values, ((0, -m % 64), (0, 0)))
        return padded if in_ring(rank) else padded.T.copy()

    got, other = outer([(x, thin(g)), (dy, thin(h))], config, interpret=INTERPRET, **drop_options(masked))
    dy, h = wide(dy, h)
    check(other, dy.T @ h, abs(dy).T @ abs(h), m, np.float32, {"the other's": dy.T @ g.astype(np.float64)})
    x, g = wide(x, g)
    kept = mask(x.shape, THRESHOLD) if masked else 1.0
    mistakes = {"half": (kept * x).T @ g / 2, "a shorter sum": (kept * x)[64:].T @ g[64:]}
    if masked:
        mistakes |= {"no mask": x.T @ g, "not rescaled": (1.0 * (kept > 0) * x).T @ g}
    # Nothing is rounded on the way, so the bound is that of float32 sums.
    check(got, (kept * x).T @ g, (kept * abs(x)).T @ abs(g), m, np.float32, mistakes)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(m=61, k=318, n=309, r=5, transposed=True, threshold=THRESHOLD),
        Problem(m=64, k=320, n=320, r=20),
    ],
    ids=str,
)
def test_linear(problem):
    """With the tiles that ship, on ragged and on aligned sizes."""
    x, w, a, b, dy = (jnp.asarray(v) for v in problem.operands())
    w = w.T if problem.transposed else w
    options = {"transposed": problem.transposed, "sms": 2, "interpret": INTERPRET}
    drop = mosaic_lora.Drop(jnp.asarray(seed_words()), THRESHOLD) if problem.threshold else None
    y, h = mosaic_lora.forward(x, w, a, b, drop, **options)
    dx, da, db = mosaic_lora.backward(dy, x, w, a, b, h, drop, **options)
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
    problem.check({"y": y, "x": dx, "a": da, "b": db})


@pytest.mark.parametrize(
    "shape, part, config, transposed",
    [((48, 120), (32, 16), Gemm(), False), ((120, 192), (64, 128), Gemm(stages=3), True)],
)
def test_side_by_side(shape, part, config, transposed):
    """Two products summed by one kernel, with a part of a thin operand that has room for more."""
    widths = 192, 128
    xs = tuple(normal(120, k, seed=i) for i, k in enumerate(widths))
    ws = tuple(normal(k, 128, spread=k**-0.5, seed=i + 2) for i, k in enumerate(widths))
    thin, tail = normal(*shape, seed=4), normal(part[1], 128, seed=5)
    stored = tuple(w.T.copy() for w in ws) if transposed else ws
    last = tail.T.copy() if transposed and in_ring(part[1]) else tail
    got = gemm(xs, stored, thin, last, config, transposed=transposed, part=part, sms=2, interpret=INTERPRET)

    x, w = (np.concatenate([np.asarray(v, np.float64) for v in vs], axis) for vs, axis in ((xs, 1), (ws, 0)))
    every, tail = wide(thin if in_ring(part[1]) else thin.T, tail)
    mine, others = every[:, part[0] : sum(part)], every[:, : part[1]]
    mistakes = {"others' ranks": x @ w + others @ tail, "one product": x[:, :192] @ w[:192] + mine @ tail}
    check(got, x @ w + mine @ tail, abs(x) @ abs(w) + abs(mine) @ abs(tail), sum(widths) + part[1], BF16, mistakes)


@pytest.mark.parametrize("splits", [1, 2])
def test_down_side_by_side(splits):
    """The last operand ends within a step of the walk."""
    xs = normal(72, 320), normal(72, 192, seed=1)
    factors = tuple(normal(64, x.shape[1], spread=0.05, seed=2) for x in xs)
    config = DownConfig(stages=4, depth=128, splits=splits)
    got = np.asarray(down(xs, factors, config, by_rank=True, interpret=INTERPRET))
    assert got.shape == (64, 128) and not got[:, 72:].any()
    x, a = (np.concatenate([np.asarray(v, np.float64) for v in vs], 1) for vs in (xs, factors))
    mistakes = {"one alone": x[:, :320] @ a[:, :320].T, "the other": x[:, 320:] @ a[:, 320:].T}
    check(got[:, :72].T, x @ a.T, abs(x) @ abs(a).T, 512, BF16, mistakes)


def test_outer_of_a_part():
    x, g = normal(128, 128), normal(48, 128, seed=1)
    (got,) = outer([(x, g)], OuterConfig(stages=4, splits=1), part=(16, 16), interpret=INTERPRET)
    x, g = wide(x, g)
    mistakes = {"others' ranks": x.T @ g[:16].T}
    check(got, x.T @ g[16:32].T, abs(x).T @ abs(g[16:32]).T, 128, np.float32, mistakes)


@pytest.mark.parametrize(
    "problem",
    [
        GroupProblem(61, 318, (189, 128, 64), (5, 16, 9), threshold=THRESHOLD),
        GroupProblem(64, 320, (320, 64), (20, 5)),
    ],
    ids=str,
)
def test_group(problem):
    x, ws, a_s, b_s, biases, dys = jax.tree.map(jnp.asarray, problem.operands())
    drop = mosaic_lora.Drop(jnp.asarray(seed_words()), THRESHOLD) if problem.threshold else None
    options = {"sms": 2, "interpret": INTERPRET}
    ys, h = mosaic_group.forward(x, ws, a_s, b_s, drop, biases=biases, **options)
    dx, das, dbs = mosaic_group.backward(dys, x, ws, a_s, b_s, h, drop, **options)
    problem.check(dx, ys, das, dbs)


def test_what_tuning_expects_of_each_kernel():
    """The kernels meet the bounds of `lora-jax tune`; half of a tail, or of a sum without its first part, does not."""
    found = list(stages(64, 320, 320, 16, jnp.bfloat16, THRESHOLD, sms=2, interpret=INTERPRET))
    assert [each.kernel.removeprefix("mosaic_") for each in found] == ["gemm", "gemm", "down", "down", "outer"]
    for each in (*found[1:3], found[4]):  # with dropout
        expected = each.expected(*each.operands)
        assert excess(each.run(each.candidates[0], *each.operands), expected.value, expected.bound) <= 1
        assert excess(expected.mistake, expected.value, expected.bound) > 1


def test_a_shard_draws_its_part_of_the_mask():
    """Down of a block that starts at row 3 and column 128 of the whole."""
    x, a = normal(67, 320), normal(320, 16, spread=320**-0.5, seed=1)
    part, a_part = x[3:, 128:].copy(), a[128:].copy()
    config = DownConfig(stages=4, depth=64)
    got = down(part, a_part.T.copy(), config, interpret=INTERPRET, **drop_options(True, origin=(3, 128)))
    x, part, a_part = wide(x, part, a_part)
    kept = mask(x.shape, THRESHOLD)
    want, magnitude = (kept * x)[3:, 128:] @ a_part, (kept * abs(x))[3:, 128:] @ abs(a_part)
    elsewhere = (kept[:64, :192] * part) @ a_part
    check(np.asarray(got).T[:64], want, magnitude, 192, BF16, {"the mask of another place": elsewhere})


def races(kernel, *operands, **options) -> bool:
    # A copy is ordered after the others of its engine: with one for each, only by what waits for it.
    params = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
    try:
        kernel(*operands, interpret=params, **options).block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # a jax of 0.12 stops at once
        if "RACE DETECTED" not in str(error):
            raise
        return True
    return interpret_pallas_call.get_races().races_found


def test_no_races():
    """Loads, products and stores of two tiles by a CTA, in the order that the barriers leave open."""
    x, w, thin, tail = normal(128, 192), normal(192, 128), normal(16, 128), normal(16, 128)
    assert not races(gemm, x, w, thin, tail, Gemm(), sms=1)


def test_a_race_would_be_noticed():
    def unordered(x, *, interpret):
        """Both warpgroups write one buffer, and nothing orders them."""

        def body(x_g, y_g, shared):
            shared[...] = x_g[...]
            y_g[...] = shared[...]

        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_types={"shared": plgpu.SMEM(x.shape, x.dtype)},
            num_threads=2,
            thread_name="wg",
            interpret=interpret,
        )(x)

    assert races(unordered, normal(128, dtype=np.float32))
