"""Every kernel that the table of tiles asks for lowers for a CUDA GPU, on every supported jax and without a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from lora_jax.kernels import mosaic, mosaic_group, mosaic_lora
from tests.kernels import reference_kernels, shipped

CALL = "custom_call @mosaic_gpu_v2"
ONE_KERNEL = mosaic.STORES_TRANSPOSED


def custom_calls(fn, *operands) -> int:
    return lowered(fn, *operands).count(CALL)


def lowered(fn, *operands) -> str:
    return jax.jit(fn).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


# A tail of its own, one in the ring, one in the deeper ring, whose masked kernels alone differ from those of 64;
# `benchmarks/compile_kernels.py` takes all ranks.
@pytest.mark.parametrize("rank, words", [(16, ""), (64, "gemm"), (256, "masked")])
def test_shipped_kernels_lower(rank, words):
    found = [kernel for kernel in shipped.kernels(rank) if words in kernel.name]
    assert {kernel.name.split()[0] for kernel in found} == {
        "gemm", *(() if rank == 64 else ("down", "outer")), *(("adapted",) if rank == 16 and ONE_KERNEL else ())
    }  # fmt: skip
    for kernel in found:
        assert custom_calls(kernel.run, *shipped.abstract(kernel)) == 1, kernel.name


def test_unwanted_gradients_cost_nothing():
    x, w, a, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, 512), (512, 512), (512, 16), (16, 512)))

    def backward(wants, x, w, a, b):
        return mosaic_lora.backward(x, x, w, a, b, x[:16], wants=wants)

    calls = {"x": 2, "a": 2, "b": 1}  # `dx` and `dA` need `g`
    for wanted, count in calls.items():
        only = mosaic_lora.Wants(**{name: name == wanted for name in calls})
        assert custom_calls(functools.partial(backward, only), x, w, a, b) == count, wanted


@pytest.mark.parametrize(
    "device, rank, dropped, counts",
    [
        # Thin product and product, forward; the same of `dy`, and `dA` with `dB`, backward.
        ("an unknown GPU", 5, True, (2, 3)),
        ("NVIDIA H200", 20, True, (2, 3)),
        # In one kernel where it is known how many of its CTAs run at once, but for dropout forward.
        ("NVIDIA H200", 5, True, (2, 2) if ONE_KERNEL else (2, 3)),
        ("NVIDIA H200", 5, False, (1, 2) if ONE_KERNEL else (2, 3)),
    ],
)
def test_kernels_of_a_linear(device, rank, dropped, counts):
    m, k, n, r, f16 = 1000, 1024, 1040, rank, jnp.float16
    shapes = [(m, k), (k, n), (k, r), (r, n), (m, n)]
    operands = [jax.ShapeDtypeStruct(shape, f16) for shape in shapes]
    seed = jax.ShapeDtypeStruct((4,), jnp.int32)

    def drop(seed):
        return mosaic_lora.Drop(seed, 3277) if dropped else None

    def forward(x, w, a, b, _, seed):
        return mosaic_lora.forward(x, w, a, b, drop(seed))

    def backward(x, w, a, b, dy, seed):
        y, h = forward(x, w, a, b, dy, seed)
        return mosaic_lora.backward(dy, x, w, a, b, h, drop(seed))

    with reference_kernels.pretending(device, multiprocessors=132 if device.startswith("NVIDIA") else None):
        assert custom_calls(forward, *operands, seed) == counts[0]
        # Of the forward pass, `h` is computed again here, by itself or with `y`.
        text = lowered(backward, *operands, seed)
    assert text.count(CALL) == 1 + counts[1]
    # Nothing is multiplied or drawn outside of the kernels.
    assert "stablehlo.dot_general" not in text and "stablehlo.rng" not in text


def test_a_group_is_four_kernels_forward_and_six_backward():
    """Of three: one pass over `x` each way, one product for its gradient, and three of all else."""
    m, k, ns, bf16 = 1000, 1024, (1024, 320, 260), jnp.bfloat16
    x, seed = jax.ShapeDtypeStruct((m, k), bf16), jax.ShapeDtypeStruct((4,), jnp.int32)
    layers = [
        [jax.ShapeDtypeStruct(shape, bf16) for shape in ((k, n), (k, 8), (8, n), (n,), (m, n))] for n in ns
    ]  # fmt: skip
    ws, a_s, b_s, biases, dys = map(list, zip(*layers, strict=True))

    def forward(x, ws, a_s, b_s, biases, seed=None):
        drop = None if seed is None else mosaic_lora.Drop(seed, 3277)
        return mosaic_group.forward(x, ws, a_s, b_s, drop, biases=biases)

    def backward(dys, x, ws, a_s, b_s, h, seed):
        return mosaic_group.backward(dys, x, ws, a_s, b_s, h, mosaic_lora.Drop(seed, 3277))

    assert custom_calls(forward, x, ws, a_s, b_s, biases, seed) == custom_calls(forward, x, ws, a_s, b_s, biases) == 4
    # No pass over `x` where each product may compute its `h`, which lies as it does otherwise.
    with reference_kernels.pretending("NVIDIA H200", multiprocessors=132):
        # Another function, because what this one does elsewhere has been traced.
        assert custom_calls(lambda *operands: forward(*operands), x, ws, a_s, b_s, biases) == (3 if ONE_KERNEL else 4)
        h = jax.eval_shape(forward, x, ws, a_s, b_s, biases)[1]
        assert h.shape[0] == 48 and h.shape[1] >= m
    text = lowered(backward, dys, x, ws, a_s, b_s, jax.ShapeDtypeStruct((48, 1024), bf16), seed)
    assert text.count(CALL) == 6 and "stablehlo.dot_general" not in text


def test_kernels_lower_where_64_bit_types_are_on():
    found = {kernel.name.split()[0]: kernel for kernel in shipped.kernels(16)}
    assert len(found) == 3 + ONE_KERNEL
    jax.clear_caches()  # what is traced already would not be traced again
    with jax.enable_x64(True):
        for kernel in found.values():
            text = lowered(kernel.run, *shipped.abstract(kernel))
            assert text.count(CALL) == 1 and "xf64" not in text, kernel.name
    jax.clear_caches()
