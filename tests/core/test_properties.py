"""Random chains of rearrangements before a product, against the dense computation in numpy."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import reference
from tests.core.harness import cast, config, normal, random_adapter

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def chains(draw):
    """(shape of a weight, steps that rearrange it): transposes, reshapes, slices, flips, repeats of size one."""
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=3)))
    steps, now = [], shape
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["transpose", "split", "merge", "slice", "flip", "expand", "squeeze"]))
        if kind == "transpose":
            order = tuple(draw(st.permutations(range(len(now)))))
            steps.append(("transpose", order))
            now = tuple(now[d] for d in order)
        elif kind == "split":
            d = draw(st.integers(0, len(now) - 1))
            outer = draw(st.sampled_from([k for k in range(1, now[d] + 1) if now[d] % k == 0]))
            now = (*now[:d], outer, now[d] // outer, *now[d + 1 :])
            steps.append(("reshape", now))
        elif kind == "merge" and len(now) > 1:
            d = draw(st.integers(0, len(now) - 2))
            now = (*now[:d], now[d] * now[d + 1], *now[d + 2 :])
            steps.append(("reshape", now))
        elif kind == "slice":
            d = draw(st.integers(0, len(now) - 1))
            start = draw(st.integers(0, now[d] - 1))
            stop = draw(st.integers(start + 1, now[d]))
            stride = draw(st.integers(1, 2))
            steps.append(("slice", (d, start, stop, stride)))
            now = (*now[:d], len(range(start, stop, stride)), *now[d + 1 :])
        elif kind == "flip":
            steps.append(("flip", draw(st.integers(0, len(now) - 1))))
        elif kind == "expand":
            d = draw(st.integers(0, len(now)))
            now = (*now[:d], 1, *now[d:])
            steps.append(("reshape", now))
        elif kind == "squeeze" and 1 in now and len(now) > 1:
            d = now.index(1)
            now = (*now[:d], *now[d + 1 :])
            steps.append(("reshape", now))
    axes = draw(st.lists(st.integers(0, len(now) - 1), min_size=1, max_size=max(1, len(now) - 1), unique=True))
    return shape, steps, now, tuple(axes), draw(st.booleans())


def rearranged(w, steps, numpy):
    for kind, value in steps:
        if kind == "transpose":
            w = numpy.transpose(w, value)
        elif kind == "reshape":
            w = numpy.reshape(w, value)
        elif kind == "flip":
            w = numpy.flip(w, value)
        else:
            d, start, stop, stride = value
            w = w[(slice(None),) * d + (slice(start, stop, stride),)]
    return w


@SETTINGS
@given(chains())
def test_any_rearrangement_before_a_product(chain):
    """Whatever the plan accepts is right; it may form the weight, and then it says so."""
    shape, steps, now, axes, weight_first = chain

    def fn(params, x, numpy=jnp):
        w = rearranged(params["w"], steps, numpy)
        places = tuple(range(1, 1 + len(axes)))
        return numpy.tensordot(w, x, (axes, places)) if weight_first else numpy.tensordot(x, w, (places, axes))

    params, x = {"w": normal(*shape)}, normal(2, *(now[d] for d in axes))
    try:
        plan = lj.plan(fn, cast(params, np.float32), x, config=config(rank=2))
    except ValueError as error:  # a vector, or an axis cut into pieces of different roles
        assert "cannot be adapted" in str(error)
        return
    adapter = random_adapter(plan, np.float32)
    site = plan.sites[0]
    a, b = adapter.factors(site)
    got = lj.apply(fn, plan)(cast(params, np.float32), adapter, x)
    want = fn({"w": reference.merged(site, params["w"], a, b)}, x.astype(np.float64), np)
    size = fn({"w": reference.merged(site, *map(abs, map(np.asarray, (params["w"], a, b))))}, abs(x), np)
    terms = math.prod(now[d] for d in axes) + site.rank
    bound = reference.tolerance("float32", terms) * size
    assert reference.excess(got, want, bound) <= 1
    base = fn(params, x.astype(np.float64), np)
    assert reference.excess(base, want, bound) > 1


@st.composite
def layouts(draw):
    """A parameter's shape and one role per axis, at least one in and one out."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    others = draw(st.lists(st.sampled_from("lio"), min_size=len(shape) - 2, max_size=len(shape) - 2))
    return shape, "".join(draw(st.permutations(["i", "o", *others])))


@SETTINGS
@given(layouts())
def test_merge_of_any_layout(layout):
    """`merge` against the definition, for every assignment of roles."""
    shape, roles = layout
    params, x = {"w": normal(*shape)}, np.float32(1)
    plan = lj.plan(lambda p, x: p["w"] * x, params, x, config=config(rank=2), axis_roles={"w": roles})
    adapter = random_adapter(plan, np.float32)
    site = plan.sites[0]
    a, b = (np.asarray(f, np.float64) for f in adapter.factors(site))
    lead = [n for n, r in zip(shape, roles, strict=True) if r == "l"]
    inner = [n for n, r in zip(shape, roles, strict=True) if r == "i"]
    outer = [n for n, r in zip(shape, roles, strict=True) if r == "o"]
    assert a.shape == (*lead, *inner, 2) and b.shape == (*lead, 2, *outer)
    flat = np.matmul(a.reshape(*lead, -1, 2), b.reshape(*lead, 2, -1)).reshape(*lead, *inner, *outer)
    # The product's axes are all leads, then ins, then outs: bring each back to its place.
    grouped = sorted(range(len(roles)), key=lambda d: ("lio".index(roles[d]), d))
    order = [grouped.index(d) for d in range(len(roles))]
    want = np.asarray(params["w"], np.float64) + site.scale * flat.transpose(order)
    np.testing.assert_allclose(lj.merge(params, adapter)["w"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reference.merged(site, params["w"], a, b), want, rtol=1e-12, atol=1e-12)
