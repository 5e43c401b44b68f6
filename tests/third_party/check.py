"""One check for every third-party model.

A `Case` states what the library must find in an unmodified model: written out, not computed from the plan. `measure`
plans, draws a random adapter and compares the adapted model with the same model at merged parameters, in float32:
its output, the gradients of every factor, and that each single site matters. The bound follows from the roundings
and the lengths of the sums; leaving out any one adapter, or doubling its scale, must exceed it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import reference
from lora_jax.sites import LORA_A, LORA_B
from lora_jax.tracing import flatten_params

RANK, ALPHA, SEED = 2, 5.0, 1
ALL_LINEAR = lj.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules="all-linear", init="random")
EVERYTHING = lj.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=".*", init="random")


@dataclass
class Model:
    """A model at random parameters.

    **Fields:** `fn(params, *args)` returns an array; `module` is what the front end adapts and `front_end` how its
    own interface is called to give the same array.
    """

    module: Any
    params: Any
    fn: Callable[..., jax.Array]
    args: tuple[Any, ...]
    front_end: FrontEnd


@dataclass
class FrontEnd:
    """How the model's own interface is called: `module(*args, **kwargs)`, of which `pick` takes the array."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    pick: Callable[[Any], jax.Array] = lambda y: y


@dataclass(frozen=True)
class Case:
    """What must be found in one model.

    **Fields:**

    - `load`: imports the package and makes the model.
    - `linear`: parameters that `"all-linear"` adapts.
    - `others`: what `".*"` adapts beside them (heads, embeddings, convolutions), each with its op.
    - `left_out`: every other parameter of two or more axes, with the beginning of the plan's reason.
    - `telling`: `(roles, shape of A, shape of B)` of parameters whose layout no shape or name would tell.
    """

    name: str
    package: str
    api: str
    load: Callable[[], Model]
    linear: frozenset[str]
    others: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    telling: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    note: str = ""

    @property
    def everything(self) -> set[str]:
        return {*self.linear, *self.others}


@dataclass(frozen=True)
class Measured:
    """What the functional interface gave, for the front ends to give again.

    **Fields:** `want`, the merged model's output; `gradient`, of the factors; `error`, the largest difference
    between adapted and merged output; `bound`, the largest allowed; `effect`, between base and merged output.
    """

    plan: lj.Plan
    adapter: lj.Adapter
    want: np.ndarray
    gradient: lj.Adapter
    error: float
    bound: float
    effect: float


def layers(n: int, *names: str) -> frozenset[str]:
    """Each name with `{}` replaced by the numbers of `n` layers."""
    return frozenset(name.format(i) for name in names for i in range(n))


def random_params(shapes: Any) -> Any:
    """Float32 values by name: weights of about unit gain, vectors near one, variances positive."""
    paths, leaves, tree = flatten_params(shapes)
    return jax.tree.unflatten(tree, [_values(p, x.shape) for p, x in zip(paths, leaves, strict=True)])


def _values(path: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
    noise = np.random.default_rng(zlib.crc32(".".join(path).encode())).standard_normal(shape)
    if len(shape) >= 2:
        return jnp.asarray(0.2 * noise, jnp.float32)
    return jnp.asarray(0.1 * noise + (path[-1] in ("scale", "weight", "w", "var")), jnp.float32)


def check_plans(case: Case, model: Model) -> lj.Plan:
    """Compares both plans with what the case states; returns the one that adapts everything."""
    linear = lj.plan(model.fn, model.params, *model.args, config=ALL_LINEAR)
    assert {site.name for site in linear.sites} == case.linear
    assert linear.materialised == ()

    plan = lj.plan(model.fn, model.params, *model.args, config=EVERYTHING)
    assert {site.name for site in plan.sites} == case.everything
    assert plan.materialised == ()
    ops = {site.name: site.op for site in plan.sites}
    assert {name: ops[name] for name in case.others} == dict(case.others)
    skipped = {row.name: row.note for row in plan.rows if row.site is None}
    wide = {row.name for row in plan.rows if len(row.shape) >= 2}
    reasons = {name: why for name, why in skipped.items() if name in wide}
    assert set(reasons) == set(case.left_out)
    assert all(reasons[name].startswith(why) for name, why in case.left_out.items()), reasons
    assert {why for name, why in skipped.items() if name not in wide} <= {"a vector", "not floating point"}
    found = {site.name: (site.roles, site.a_shape, site.b_shape) for site in plan.sites}
    assert {name: found[name] for name in case.telling} == dict(case.telling)
    return plan


def measure(plan: lj.Plan, model: Model) -> Measured:
    """See the module's docstring."""
    adapter = plan.init(jax.random.key(SEED))
    _, leaves, _ = flatten_params(model.params)
    before = [np.array(leaf) for leaf in leaves]

    adapted = quick_jit(output_and_gradient(lj.apply(model.fn, plan), 1))
    plain = quick_jit(output_and_gradient(model.fn, 0))
    got, factors = adapted(model.params, adapter, *model.args)
    merged = merged_params(model.params, adapter)
    want, dw = plain(merged, *model.args)

    bound = bound_of(plan, want)
    error = largest(got, want)
    assert error <= bound
    effect = largest(plain(model.params, *model.args)[0], want)
    assert effect > 1e3 * bound, "the adapter changes nothing"
    twice = jax.tree.map(lambda x: x * 2**0.5, adapter)
    assert largest(adapted(model.params, twice, *model.args)[0], want) > 1e3 * bound, "a doubled scale passes"
    for site in plan.sites:
        without = adapted(model.params, dropped(adapter, site), *model.args)[0]
        assert largest(without, want) > bound, f"nobody would miss the adapter of {site.name}"

    check_gradients(plan, adapter, factors, dw)
    check_merge(model.params, adapter)
    _, after, _ = flatten_params(model.params)
    assert all(x is y for x, y in zip(leaves, after, strict=True))
    for was, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(was, np.asarray(now))
    return Measured(plan, adapter, np.asarray(want), factors, error, bound, effect)


def quick_jit(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` without LLVM's optimisations: these models run for milliseconds and compile for seconds."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def output_and_gradient(fn: Callable[..., jax.Array], wrt: int) -> Callable[..., tuple[Any, Any]]:
    """`fn`'s output, and the gradient of a fixed random weighting of it by its argument `wrt`."""

    def loss(*args: Any) -> tuple[jax.Array, jax.Array]:
        y = fn(*args)
        return (y * weighting(y.shape)).sum(), y

    def run(*args: Any) -> tuple[Any, Any]:
        gradient, y = jax.grad(loss, argnums=wrt, has_aux=True)(*args)
        return y, gradient

    return run


def weighting(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def merged_params(params: Any, adapter: lj.Adapter) -> Any:
    """The parameters with every adapter folded in, by the float64 reference, rounded once to float32."""
    sites = {site.path: site for site in adapter.sites}
    paths, leaves, tree = flatten_params(params)
    out = [
        jnp.asarray(reference.merged(sites[p], x, *adapter.factors(sites[p])), jnp.float32) if p in sites else x
        for p, x in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, out)


def bound_of(plan: lj.Plan, want: Any) -> float:
    """Every sum on the way to the output adds its own error, at most relative to the largest value in sight."""
    terms = sum(site.fan_in + site.rank for site in plan.sites)
    return reference.tolerance(np.float32, terms) * float(np.max(np.abs(want)))


def largest(got: Any, want: Any) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))))


def dropped(adapter: lj.Adapter, site: lj.Site) -> lj.Adapter:
    """The adapter with one site's B at zero."""
    zero = {other.leaf_path(f): x for other in adapter.sites for f, x in _pair(adapter, other)}
    zero[site.leaf_path(LORA_B)] = jnp.zeros_like(adapter.factors(site)[1])
    return lj.Adapter.from_leaves(zero, adapter.sites)


def _pair(adapter: lj.Adapter, site: lj.Site) -> Iterable[tuple[str, jax.Array]]:
    return zip((LORA_A, LORA_B), adapter.factors(site), strict=True)


def check_gradients(plan: lj.Plan, adapter: lj.Adapter, got: lj.Adapter, dw: Any) -> None:
    """Gradients of the factors against those of the merged weights, by the chain rule in float64."""
    paths, leaves, _ = flatten_params(dw)
    by_path = dict(zip(paths, leaves, strict=True))
    for site in plan.sites:
        a, b = adapter.factors(site)
        wanted = reference.factor_gradients(site, a, b, by_path[site.path])
        for name, y, w in zip((LORA_A, LORA_B), got.factors(site), wanted, strict=True):
            assert np.any(w), f"{site.name}.{name} has no gradient to compare"
            assert largest(y, w) <= 2 * bound_of(plan, w), f"gradient of {site.name}.{name}"


def check_merge(params: Any, adapter: lj.Adapter) -> None:
    """`lj.merge` against the reference; leaves without an adapter stay the same objects."""
    sites = {site.path: site for site in adapter.sites}
    paths, leaves, _ = flatten_params(params)
    for path, was, got in zip(paths, leaves, flatten_params(lj.merge(params, adapter))[1], strict=True):
        if path not in sites:
            assert got is was
            continue
        want = reference.merged(sites[path], was, *adapter.factors(sites[path]))
        bound = reference.tolerance(np.float32, RANK) * float(np.max(np.abs(want)))
        assert largest(got, want) <= bound < largest(was, want)
