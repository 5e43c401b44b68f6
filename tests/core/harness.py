"""One check for every way a model can use a weight.

`check(fn, params, *args)` plans, draws a random adapter and compares the adapted function with `fn` at the merged
parameters, in float64: outputs, gradients of A, B and the base, no weight formed on the way, and the same bits as
the base where B is zero. It also shows that the comparison would fail without the adapter, with twice its scale,
and without any single one of its sites.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import reference
from lora_jax.sites import LORA_A, LORA_B, MAGNITUDE
from lora_jax.tracing import flatten_params
from tests.core.dataflow import formed_weights

# Enough for every sum in these tests; in float64 the bound is 1e-12 of the result either way.
TERMS = 1 << 12


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(list(seed) or [0])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 values, a function of shape and seed."""
    return rng(seed, *shape).standard_normal(shape).astype(np.float32)


def cast(tree: Any, dtype: Any) -> Any:
    """Float leaves in `dtype`; keys, integers and Python values as they are."""

    def one(x: Any) -> Any:
        if isinstance(x, np.ndarray | np.generic | jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
            return jax.device_put(
                np.asarray(x).astype(dtype)
            )  # by numpy: jnp would compile a conversion for each shape
        return jax.device_put(x) if isinstance(x, np.ndarray) else x

    return jax.tree.map(one, tree)


def config(**changes: Any) -> lj.LoRAConfig:
    """Every parameter that can be adapted, rank 3, a scale that no binary float holds exactly, A and B random."""
    return lj.LoRAConfig(**{"rank": 3, "alpha": 4.0, "target_modules": ".*", "init": "random", **changes})


def merged_params(
    params: Any, adapter: lj.Adapter, times: float = 1.0, without: str = "", magnitudes: bool = True
) -> Any:
    """Float64 parameters with `times` the scale at every site but `without`, by the reference."""
    paths, leaves, tree = flatten_params(params)
    sites = {site.path: site for site in adapter.sites}
    out = []
    for path, leaf in zip(paths, leaves, strict=True):
        site = sites.get(path)
        if site is None or site.name == without:
            out.append(leaf)
        else:
            scaled = dataclasses.replace(site, alpha=times * site.alpha)
            magnitude = adapter.vectors(site)[MAGNITUDE] if site.dora and magnitudes else None
            out.append(jax.device_put(reference.merged(scaled, leaf, *adapter.factors(site), magnitude)))
    return jax.tree.unflatten(tree, out)


def random_adapter(plan: lj.Plan, dtype: Any, seed: int = 7) -> lj.Adapter:
    """A and B of about the base's size. By numpy: `plan.init` compiles a kernel for each shape."""
    leaves = {}
    for site in plan.sites:
        for factor, shape, terms in ((LORA_A, site.a_shape, site.fan_in), (LORA_B, site.b_shape, site.rank)):
            values = rng(seed, zlib.crc32(site.name.encode()), *shape).standard_normal(shape) / np.sqrt(terms)
            leaves[site.leaf_path(factor)] = jax.device_put(values.astype(dtype))
        if site.dora:
            values = rng(seed, zlib.crc32(site.name.encode())).uniform(0.5, 2.0, site.vector_shape)
            leaves[site.leaf_path(MAGNITUDE)] = jax.device_put((values * np.sqrt(site.fan_in)).astype(dtype))
    return lj.Adapter.from_leaves(leaves, plan.sites)


def zero_b(adapter: lj.Adapter) -> lj.Adapter:
    leaves = {path: adapter.leaf(path) for site in adapter.sites for path in site.leaves}
    for site in adapter.sites:
        b = adapter.factors(site)[1]
        leaves[site.leaf_path(LORA_B)] = jax.device_put(np.zeros(b.shape, b.dtype))
    return lj.Adapter.from_leaves(leaves, adapter.sites)


def floats(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]


def check(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    materialised: Sequence[str] = (),
    gradients: bool = True,
    forms_weight: bool | None = None,
    axis_roles: Any = None,
    **changes: Any,
) -> lj.Plan:
    """See the module's docstring. `materialised` names the primitives that are expected to need a whole weight."""
    with jax.enable_x64(True):
        params, args = cast(params, np.float64), cast(args, np.float64)
        plan = lj.plan(fn, params, *args, config=config(dtype="float64", **changes), axis_roles=axis_roles)
        assert plan.sites
        assert sorted({primitive for _, primitive, _ in plan.materialised}) == sorted(materialised), plan
        adapter = random_adapter(plan, np.float64)
        adapted_fn = lj.apply(fn, plan)

        least = min(math.prod(site.shape) for site in plan.sites) if changes.get("use_dora") else 0
        formed = formed_weights(adapted_fn, params, adapter, args, least)
        assert bool(formed) == bool(materialised if forms_weight is None else forms_weight), formed

        if gradients:
            adapted = jax.jit(_outputs_and_gradients(adapted_fn, 2))
            base = jax.jit(_outputs_and_gradients(fn, 1))
        else:
            adapted, base = (jax.jit(lambda *a, f=f: (floats(f(*a)), None)) for f in (adapted_fn, fn))
        got, got_grads = adapted(params, adapter, *args)
        want, want_grads = base(merged_params(params, adapter), *args)
        want = [np.asarray(w) for w in want]

        def worst(outputs: Any) -> float:
            return max(reference.excess(y, w, _bound(w)) for y, w in zip(outputs, want, strict=True))

        assert worst(got) <= 1
        # A bound that these also met would prove nothing.
        plain, _ = base(params, *args)
        assert worst(plain) > 1e3, "the adapter changes nothing"
        assert worst(base(merged_params(params, adapter, times=2.0), *args)[0]) > 1e3
        if len(plan.sites) > 1:
            for site in plan.sites:
                without = base(merged_params(params, adapter, without=site.name), *args)[0]
                assert worst(without) > 1, f"{site.name} changes nothing"

        if gradients:
            _check_gradients(plan, params, adapter, got_grads, want_grads[0])

        if any(site.dora for site in plan.sites):
            assert worst(base(merged_params(params, adapter, magnitudes=False), *args)[0]) > 1e3
            return plan
        off, _ = adapted(params, zero_b(adapter), *args)
        for y, w in zip(off, plain, strict=True):
            if materialised:
                # The formed weight is the base, but XLA may compile what follows it in other pieces (a determinant's
                # product rounds differently by one bit).
                assert reference.excess(y, w, _bound(w)) <= 1, "with B = 0 the base must come back"
                continue
            np.testing.assert_array_equal(y, w, err_msg="with B = 0 the base must come back bit for bit")
    return plan


def _bound(want: np.ndarray) -> float:
    """Relative to the largest element: outputs of deep functions have no elementwise magnitude of their own."""
    return reference.tolerance(np.float64, TERMS) * float(np.max(np.abs(want), initial=0))


def _outputs_and_gradients(fn: Callable[..., Any], n: int) -> Callable[..., Any]:
    """`fn`'s float outputs, and the gradients of a random weighting of them by its first `n` arguments."""

    def loss(trees: Any, rest: Any) -> Any:
        outputs = floats(fn(*trees, *rest))
        total = sum((y * normal(*y.shape, seed=99)).sum() for y in outputs)
        return total, outputs

    def run(*args: Any) -> Any:
        grads, outputs = jax.grad(loss, has_aux=True, allow_int=True)(args[:n], args[n:])
        return outputs, grads

    return run


def _check_gradients(plan: lj.Plan, params: Any, adapter: lj.Adapter, got: Any, want_params: Any) -> None:
    got_params, got_adapter = got
    paths, want_leaves, _ = flatten_params(want_params)
    _, got_leaves, _ = flatten_params(got_params)
    of_merged = dict(zip(paths, want_leaves, strict=True))
    bases = dict(zip(paths, flatten_params(params)[1], strict=True))
    # DoRA's norm is detached: the gradient of W + s·A·B is that of the merged weight times c.
    of_sum = dict(of_merged)
    for site in plan.sites:
        if site.dora:
            c = reference.dora_scale(site, bases[site.path], *adapter.factors(site), adapter.vectors(site)[MAGNITUDE])
            of_sum[site.path] = c * np.asarray(of_merged[site.path])
    # Relative to the largest gradient: some are zero but for rounding, such as a key bias's before a softmax.
    bound = max(_bound(w) for w in of_sum.values() if jnp.issubdtype(w.dtype, jnp.floating))
    for path, y in zip(paths, got_leaves, strict=True):
        w = of_sum[path]
        if jnp.issubdtype(w.dtype, jnp.floating):
            assert reference.excess(y, np.asarray(w), bound) <= 1, f"gradient of the base's {path}"
    for site in plan.sites:
        a, b = adapter.factors(site)
        wanted = dict(zip((LORA_A, LORA_B), reference.factor_gradients(site, a, b, of_sum[site.path]), strict=True))
        if site.dora:
            wanted[MAGNITUDE] = reference.magnitude_gradient(site, bases[site.path], a, b, of_merged[site.path])
        for name, w in wanted.items():
            y = got_adapter.leaf(site.leaf_path(name))
            assert np.any(w), f"{site.name}.{name} has no gradient to compare"
            assert reference.excess(y, w, _bound(w)) <= 1, f"gradient of {site.name}.{name}"
