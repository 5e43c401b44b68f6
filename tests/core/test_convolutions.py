"""Convolutions: 1, 2 and 3 dimensions, strides, dilation, groups, depthwise, padding, transposed, layouts."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from tests.core.harness import check, normal


def conv(shape, x_shape, **settings):
    spatial = len(shape) - 2
    letters = "DHW"[3 - spatial :]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    settings = {"window_strides": (1,) * spatial, "padding": "SAME", "dimension_numbers": numbers, **settings}
    return (lambda w, x: lax.conv_general_dilated(x, w, **settings)), shape, x_shape


CASES = {
    "1-D": conv((3, 4, 5), (2, 7, 4)),
    "2-D": conv((3, 2, 4, 5), (2, 6, 5, 4)),
    "3-D": conv((2, 3, 2, 4, 5), (2, 4, 5, 3, 4)),
    "1x1": conv((1, 1, 4, 5), (2, 6, 5, 4)),
    "strides": conv((3, 3, 4, 5), (2, 7, 6, 4), window_strides=(2, 3)),
    "valid": conv((3, 3, 4, 5), (2, 7, 6, 4), padding="VALID"),
    "explicit padding": conv((3, 3, 4, 5), (2, 5, 6, 4), padding=((2, 0), (1, 3))),
    "kernel dilation": conv((3, 3, 4, 5), (2, 9, 8, 4), rhs_dilation=(2, 3)),
    "input dilation": conv((3, 3, 4, 5), (2, 4, 4, 4), lhs_dilation=(2, 2), padding=((1, 2), (2, 1))),
    "groups": conv((3, 3, 2, 6), (2, 5, 5, 4), feature_group_count=2),
    "depthwise": conv((3, 3, 1, 4), (2, 5, 5, 4), feature_group_count=4),
    "depthwise, multiplier 2": conv((3, 1, 8), (2, 6, 4), feature_group_count=4),
    "NCHW": conv((5, 4, 3, 3), (2, 4, 6, 6), dimension_numbers=("NCHW", "OIHW", "NCHW")),
    "NCHW, groups": conv((6, 2, 3, 3), (2, 4, 5, 5), dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=2),
    "output first": conv((3, 3, 4, 5), (2, 5, 5, 4), dimension_numbers=("NHWC", "HWIO", "CNHW")),
    "transposed": (
        lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (3, 3, 4, 5),
        (2, 4, 4, 4),
    ),
    "transposed as a gradient": (
        lambda w, x: lax.conv_transpose(
            x, w, (2,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"), transpose_kernel=True
        ),
        (3, 5, 4),
        (2, 4, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lax(name):
    use, shape, x_shape = CASES[name]
    plan = check(lambda params, x: use(params["w"], x), {"w": normal(*shape)}, normal(*x_shape))
    site = plan.sites[0]
    assert site.op == "conv" and site.roles.count("o") == 1
    # B is (rank, out): the low-rank branch ends in a 1x1 convolution.
    assert len(site.b_shape) == 2


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "CAUSAL", 2])
def test_linen_padding(padding):
    model = nn.Conv(5, (3,), padding=padding, strides=2)
    check(lambda p, x: model.apply({"params": p}, x), {"kernel": normal(3, 4, 5), "bias": normal(5)}, normal(2, 8, 4))


def test_linen_conv_then_transpose():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Conv(6, (3, 3), feature_group_count=2, kernel_dilation=2, name="down")(x))
            return nn.ConvTranspose(3, (4, 4), strides=(2, 2), name="up")(x)

    params = {"down": {"kernel": normal(3, 3, 2, 6)}, "up": {"kernel": normal(4, 4, 6, 3)}}
    params["down"]["bias"], params["up"]["bias"] = normal(6), normal(3)
    plan = check(lambda p, x: Net().apply({"params": p}, x), params, normal(1, 5, 4, 4))
    assert [s.op for s in plan.sites] == ["conv", "conv"] and plan.sites[0].groups == 2


def test_nnx_conv_then_transpose():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.down = nnx.Conv(4, 4, (3,), feature_group_count=4, rngs=rngs)
            self.up = nnx.ConvTranspose(4, 3, (3,), strides=2, rngs=rngs)

        def __call__(self, x):
            return self.up(jnp.tanh(self.down(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    plan = check(lambda p, x: nnx.merge(graph, p)(x), params, normal(1, 6, 4))
    assert {s.name: s.groups for s in plan.sites} == {"down.kernel": 4, "up.kernel": 1}


def test_batch_groups_are_formed_in_full():
    def fn(params, x):
        y = lax.conv_general_dilated(
            x, params["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), batch_group_count=2
        )
        return y, jnp.einsum("nhc,kco->nkho", x, params["w"])

    check(fn, {"w": normal(3, 4, 6)}, normal(2, 5, 4), materialised=["conv_general_dilated"])


def test_kernel_spec_names_the_layout():
    """(out, in, spatial ...) positions, which the exporters need."""
    specs = {}
    for name in ("2-D", "NCHW"):
        use, shape, x_shape = CASES[name]
        plan = check(lambda p, x, use=use: use(p["w"], x), {"w": normal(*shape)}, normal(*x_shape), gradients=False)
        specs[name] = plan.sites[0].kernel_spec
    assert specs == {"2-D": (3, 2, 0, 1), "NCHW": (0, 1, 2, 3)}
