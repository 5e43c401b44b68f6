"""Rotary row orders: the same attention scores from either order with its own rotation, and an exact inverse."""

import numpy as np
import pytest

from lora_torch import rotary_to_half, rotary_to_interleaved

pytestmark = pytest.mark.pinned

HEADS, SIZE, WIDTH = 3, 8, 10


def rotated(q: np.ndarray, position: int, order: str) -> np.ndarray:
    """RoPE of one vector (heads, size) as complex numbers, float64, written from its definition."""
    angle = position * 10000.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
    if order == "half":
        z = (q[:, : SIZE // 2] + 1j * q[:, SIZE // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=1)
    z = (q[:, 0::2] + 1j * q[:, 1::2]) * np.exp(1j * angle)
    return np.stack([z.real, z.imag], axis=2).reshape(HEADS, SIZE)


def scores(wq: np.ndarray, wk: np.ndarray, x: np.ndarray, y: np.ndarray, order: str) -> np.ndarray:
    q = rotated((wq @ x).reshape(HEADS, SIZE), 5, order)
    k = rotated((wk @ y).reshape(HEADS, SIZE), 2, order)
    return np.einsum("nh,nh->n", q, k)


def test_same_scores() -> None:
    rng = np.random.default_rng(0)
    wq, wk = rng.normal(size=(2, HEADS * SIZE, WIDTH))
    x, y = rng.normal(size=(2, WIDTH))
    want = scores(wq, wk, x, y, "interleaved")
    got = scores(rotary_to_half(wq, HEADS), rotary_to_half(wk, HEADS), x, y, "half")
    np.testing.assert_allclose(got, want, rtol=1e-12)
    # Not reordered, or reordered the wrong way, the scores are others.
    assert np.max(abs(scores(wq, wk, x, y, "half") - want)) > 1e-3
    wrong = scores(rotary_to_interleaved(wq, HEADS), rotary_to_interleaved(wk, HEADS), x, y, "half")
    assert np.max(abs(wrong - want)) > 1e-3


def test_adapter_rows_follow_the_weight() -> None:
    """Reordering B reorders the update: to_half(W + B A) = to_half(W) + to_half(B) A."""
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=shape) for shape in ((HEADS * SIZE, WIDTH), (2, WIDTH), (HEADS * SIZE, 2)))
    whole = rotary_to_half(w + b @ a, HEADS)
    np.testing.assert_allclose(rotary_to_half(w, HEADS) + rotary_to_half(b, HEADS) @ a, whole, rtol=1e-12)
    assert np.max(abs(rotary_to_half(w, HEADS) + b @ a - whole)) > 1e-3


@pytest.mark.parametrize("axis,shape", [(0, (24, 10)), (1, (10, 24)), (-1, (24,)), (1, (2, 24, 3))])
def test_exact_inverse(axis: int, shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    half = rotary_to_half(w, HEADS, axis)
    assert half.flags.c_contiguous and not np.array_equal(half, w)
    assert np.array_equal(rotary_to_interleaved(half, HEADS, axis), w)
    assert np.array_equal(rotary_to_half(rotary_to_interleaved(w, HEADS, axis), HEADS, axis), w)


def test_torch_and_jax_arrays() -> None:
    import jax.numpy as jnp

    torch = pytest.importorskip("torch")
    w = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
    want = rotary_to_half(w, HEADS)
    assert np.array_equal(rotary_to_half(torch.tensor(w), HEADS).numpy(), want)
    assert np.array_equal(rotary_to_half(jnp.asarray(w), HEADS), want)


def test_agrees_with_transformers_llama_conversion() -> None:
    """transformers' own Llama converter, whose one-line permutation is not importable: restated on indices.

    Row n * size + 2 * j + c of Meta's order is row n * size + c * size / 2 + j of transformers'.
    """
    rows = np.arange(HEADS * SIZE)
    half = rotary_to_half(rows, HEADS)
    for n in range(HEADS):
        for j in range(SIZE // 2):
            for c in range(2):
                assert half[n * SIZE + c * SIZE // 2 + j] == n * SIZE + 2 * j + c


@pytest.mark.parametrize(
    "shape,heads,axis,message",
    [
        ((24, 2), 5, 0, "has length 24, which is not 5 heads of an even size"),
        ((15, 2), 5, 0, "has length 15"),
        ((24, 2), 0, 0, "is not 0 heads"),
        ((24, 2), 3, 2, "axis 2 does not exist"),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], heads: int, axis: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary_to_half(np.zeros(shape), heads, axis)
