"""Mixture-of-experts layers: grouped products and einsums over stacked kernels; routers are left alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from tests.core.harness import check, config, normal

PARAMS = {
    "router": {"kernel": normal(6, 3)},
    "experts": {"up": normal(3, 6, 8), "down": normal(3, 8, 6)},
}


def dense_experts(params, x):
    """Every expert sees every token, weighted by the router."""
    weights = jax.nn.softmax(x @ params["router"]["kernel"])
    h = jnp.tanh(jnp.einsum("td,edf->etf", x, params["experts"]["up"]))
    return jnp.einsum("etf,efd,te->td", h, params["experts"]["down"], weights)


def grouped_experts(params, x):
    """Tokens sorted by expert, one grouped product per projection."""
    choice = jnp.argmax(x @ params["router"]["kernel"], axis=-1)
    order = jnp.argsort(choice)
    sizes = jnp.bincount(choice, length=3).astype(jnp.int32)
    h = lax.ragged_dot(x[order], params["experts"]["up"], sizes)
    return lax.ragged_dot(jnp.tanh(h), params["experts"]["down"], sizes)[jnp.argsort(order)]


def looped_experts(params, x):
    outs = [jnp.tanh(x @ params["experts"]["up"][e]) @ params["experts"]["down"][e] for e in range(3)]
    return sum((1 + e) * y for e, y in enumerate(outs))


def transposed_experts(params, x):
    """Kernels stored (expert, out, in), as PyTorch does."""
    sizes = jnp.array([4, 2, 3], jnp.int32)
    h = lax.ragged_dot(x, params["experts"]["down"].swapaxes(1, 2)[:, :, ::-1], sizes)
    return lax.ragged_dot(jnp.tanh(h), params["experts"]["up"].swapaxes(1, 2), sizes)


@pytest.mark.parametrize("layer", [grouped_experts, looped_experts])
def test_experts(layer):
    plan = check(layer, PARAMS, normal(9, 6), target_modules="experts.*")
    assert {s.name: (s.roles, s.a_shape, s.b_shape) for s in plan.sites} == {
        "experts.up": ("lio", (3, 6, 3), (3, 3, 8)),
        "experts.down": ("lio", (3, 8, 3), (3, 3, 6)),
    }


def test_transposed_experts():
    plan = check(transposed_experts, PARAMS, normal(9, 6), target_modules="experts.*")
    assert {s.name: s.roles for s in plan.sites} == {"experts.up": "loi", "experts.down": "loi"}


def test_dense_experts_read_from_the_trace():
    """An axis that the first product keeps and the second sums is like an axis of heads; one may say otherwise."""
    plan = check(dense_experts, PARAMS, normal(9, 6), target_modules="experts.*")
    assert {s.name: s.roles for s in plan.sites} == {"experts.up": "oio", "experts.down": "iio"}
    stated = {"experts.up": "lio", "experts.down": "lio"}
    plan = check(dense_experts, PARAMS, normal(9, 6), target_modules="experts.*", axis_roles=stated)
    assert {s.name: s.a_shape for s in plan.sites} == {"experts.up": (3, 6, 3), "experts.down": (3, 8, 3)}


def test_grouped_products_both_ways():
    """One weight in two grouped products, contracted from either side."""

    def fn(params, x, sizes):
        h = jnp.tanh(lax.ragged_dot(x, params["w"], sizes))
        return lax.ragged_dot(h, params["w"].swapaxes(1, 2), sizes)

    check(fn, {"w": normal(3, 6, 5)}, normal(9, 6), np.array([4, 2, 3], np.int32))


def test_grouped_product_with_merged_axes():
    def fn(params, x, sizes):
        return lax.ragged_dot(x, params["w"].reshape(3, 6, 8), sizes)

    check(fn, {"w": normal(3, 6, 2, 4)}, normal(9, 6), np.array([4, 2, 3], np.int32))


def test_a_form_of_grouped_product_without_a_rule():
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))

    def fn(params, x, sizes):
        y = lax.ragged_dot_general(x, params["w"], sizes, numbers)
        return y, jnp.einsum("etd,efd->etf", jnp.stack([x, -x, x]), params["w"])

    sizes = np.array([4, 2, 3], np.int32)
    check(fn, {"w": normal(3, 5, 6)}, normal(9, 6), sizes, materialised=["ragged_dot_general"])


@pytest.mark.parametrize("layer", [dense_experts, grouped_experts])
@pytest.mark.parametrize("targets", ["all-linear", ".*"])
def test_routers_only_by_name(layer, targets):
    def planned(**changes):
        return lj.plan(layer, PARAMS, jnp.asarray(normal(9, 6)), config=config(**changes))

    plan = planned(target_modules=targets)
    assert {s.name for s in plan.sites} == {"experts.up", "experts.down"}
    assert "router" in next(row.note for row in plan.rows if row.name == "router.kernel")
    assert {s.name for s in planned(target_modules=["router"]).sites} == {"router.kernel"}
    assert {s.name for s in planned(target_modules=["router.kernel", "up"]).sites} == {"router.kernel", "experts.up"}
