"""Layouts against plain numpy, their exact inverse, and what they refuse."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lora_torch.arrays import ops_of
from lora_torch.layouts import NAMED, Layout

NUMPY = ops_of("numpy")


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    "spec,shape,want",
    [
        ("linear", (3, 4), lambda x: [x.T]),
        ("same", (3, 4, 5), lambda x: [x]),
        ("same", (), lambda x: [x]),
        ("heads_in", (3, 4, 5), lambda x: [x.reshape(3, 20).T]),
        ("heads_out", (4, 5, 3), lambda x: [x.reshape(20, 3).T]),
        ("heads_first", (4, 3, 5), lambda x: [np.stack([x[n, :, h] for n in range(4) for h in range(5)])]),
        ("heads_bias", (4, 5), lambda x: [x.reshape(20)]),
        ("conv", (2, 4, 5), lambda x: [np.moveaxis(x, (2, 1), (0, 1))]),
        ("conv", (2, 3, 4, 5), lambda x: [x.transpose(3, 2, 0, 1)]),
        ("conv_transpose", (2, 3, 4, 5), lambda x: [x[::-1, ::-1].transpose(2, 3, 0, 1)]),
        ("s k d h -> (k h) d", (2, 3, 4, 5), lambda x: [x[s].transpose(0, 2, 1).reshape(15, 4) for s in range(2)]),
        ("a s b -> b a", (2, 3, 4), lambda x: [x[:, s].T for s in range(3)]),
        ("e s d -> d", (2, 3, 4), lambda x: [x[e, s] for e, s in itertools.product(range(2), range(3))]),
        ("~a b -> b a", (2, 3), None),
    ],
)
def test_against_numpy(spec: str, shape: tuple[int, ...], want) -> None:
    if want is None:
        with pytest.raises(ValueError, match="the left side takes plain axis names"):
            Layout.parse(spec)
        return
    x = numbered(*shape)
    bound = Layout.parse(spec).bind(shape)
    got = bound.to_torch(x, NUMPY)
    assert len(got) == len(want(x)) == np.prod(bound.split_shape, dtype=int)
    for piece, expected in zip(got, want(x), strict=True):
        assert piece.shape == expected.shape == bound.torch_shape
        assert np.array_equal(piece, expected)
        assert piece.flags.c_contiguous
    back = bound.from_torch(got, NUMPY)
    assert np.array_equal(back, x) and back.shape == x.shape and back.flags.c_contiguous


@pytest.mark.parametrize("stack_axes", [(0,), (1,), (0, 0), (2, 1), (3, 0)])
@pytest.mark.parametrize("spec", ["linear", "s i o -> o i", "... i o -> o i ..."])
def test_stacks_are_split_first_and_return(spec: str, stack_axes: tuple[int, ...]) -> None:
    """Stacking per-layer arrays by numpy, inner stack first, is undone by the bound layout."""
    layout = Layout.parse(spec)
    sizes = (2, 3)[: len(stack_axes)]
    base = (4, 5) if spec == "linear" else (2, 4, 5)
    layers = numbered(*sizes, *base)

    def stack(part: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        if not axes:
            return part
        return np.stack([stack(item, axes[1:]) for item in part], axis=axes[0])

    x = stack(layers, stack_axes)
    bound = layout.bind(x.shape, stack_axes)
    inner = layout.bind(base)
    want = [piece for index in np.ndindex(*sizes) for piece in inner.to_torch(layers[index], NUMPY)]
    got = bound.to_torch(x, NUMPY)
    assert len(got) == len(want) and all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert np.array_equal(bound.from_torch(got, NUMPY), x)


@pytest.mark.parametrize("kind", ["jax", "torch"])
@pytest.mark.parametrize("spec", ["s ... i o -> o i ~...", "s k d h -> (k h) d"])
def test_every_library_agrees_with_numpy(kind: str, spec: str) -> None:
    torch = pytest.importorskip("torch") if kind == "torch" else None
    x = numbered(2, 3, 4, 5)
    bound = Layout.parse(spec).bind(x.shape)
    other = torch.tensor(x) if torch else jnp.asarray(x)
    got = bound.to_torch(other, ops_of(kind))
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(got, bound.to_torch(x, NUMPY), strict=True))
    assert np.array_equal(np.asarray(bound.from_torch(got, ops_of(kind))), x)


def test_same_result_ignores_axes_of_length_one_only() -> None:
    def same(one: str, other: str, shape: tuple[int, ...]) -> bool:
        return Layout.parse(one).bind(shape).same_result(Layout.parse(other).bind(shape))

    # One head: both take (D, 1, H) to (H, D). Two heads: both shapes could agree, the rows do not.
    assert same("heads_in", "heads_out", (5, 1, 7))
    assert same("heads_in", "n d h -> (n h) d", (1, 1, 7)) and not same("heads_in", "heads_first", (2, 2, 7))
    assert same("linear", "same", (1, 1))
    assert not same("linear", "same", (1, 3))  # another shape
    assert not same("linear", "same", (3, 3))


@pytest.mark.parametrize(
    "spec,message",
    [
        ("i o", "neither one of"),
        ("i o -> o i -> i", "with one arrow"),
        ("i i -> i", "named twice on the left"),
        ("i o -> o o", "named twice on the right"),
        ("i o -> o k", r"\['k'\] on the right side but not on the left"),
        ("i o -> (o i", "never closed"),
        ("i o -> o) i", r"'\)' without"),
        ("i o -> ((o i))", "cannot be nested"),
        ("(i o) -> o i", "the left side takes plain axis names"),
        ("i 2 -> i", "cannot read '2'"),
        ("... i -> i", "can be neither split nor merged"),
        ("... i -> (... i)", "can be neither split nor merged"),
    ],
)
def test_malformed_layouts(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.parse(spec)


def test_wrong_number_of_axes() -> None:
    assert set(NAMED) >= {"linear", "conv", "heads_in"}
    with pytest.raises(ValueError, match=r"'i o -> o i' does not describe an array of 3 axes, shape \(1, 2, 3\)"):
        Layout.parse("linear").bind((1, 2, 3))
    with pytest.raises(ValueError, match="stack axis 3 does not exist"):
        Layout.parse("linear").bind((1, 2, 3), (3,))
