"""`apply`: a function of (params, adapter) from a function of params."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax import tracing
from lora_jax.adapters import Adapter, as_adapter
from lora_jax.interpret import Interpreter, site_key
from lora_jax.ops.choice import check_implementation
from lora_jax.ops.dropout import threshold
from lora_jax.planning import Plan
from lora_jax.sites import Site
from lora_jax.weights.lora import lora_weight
from lora_jax.weights.virtual import Virtual


class MaterialisedWarning(UserWarning):
    """An adapted weight was formed in full where the plan did not foresee it."""


def apply(fn: Callable[..., Any], plan: Plan, *, implementation: str | None = None) -> Callable[..., Any]:
    """The adapted function: `apply(fn, plan)(params, adapter, *args, key=None, **kwargs)`.

    Computes `fn` with every planned parameter W standing for W + s·A·B, without forming that sum. Pure, so it
    composes with `jit`, `grad`, `vmap`, `checkpoint`, `scan` and `eval_shape`; wrap it in `jax.jit`, since every
    call traces. Pass `params` as an argument of the jitted function, not as a constant it closes over.

    `implementation`: of the adapted products. None lets each one run on what suits the platform, its dtypes and its
    sizes (`lora_jax.explain` shows which, and why); `"xla"` is the plain one; `"mosaic_gpu"` are fused
    kernels for Hopper GPUs, `"triton"` those for Ampere, Ada and Hopper, and an error, with the reason, for a product
    that they can't compute.

    **Arguments of the result:**

    - `params`: the base, unchanged; `adapter`: an `Adapter` for the planned parameters, whose own rank, alpha and
      roles count, or a nested dict of leaves as the plan has them.
    - `key`: a PRNG key turns dropout on (if the configuration has any); None turns it off.

    **Raises:** `ValueError` if parameters or adapter do not fit the plan, naming each leaf.
    """
    check_implementation(implementation)
    _refuse_own_key(fn)
    if plan.config.dropout:
        threshold(plan.config.dropout)
    expected = {(name, primitive) for name, primitive, _ in plan.materialised}

    def report(w: Virtual, primitive: str) -> None:
        if not w.is_row and (w.kind.name, primitive) not in expected:
            warnings.warn(
                f"`{w.kind.name}` {tuple(w.base.shape)} is formed in full by `{primitive}`: right, but slower. "
                "Plan with arguments like these to see it in the table.",
                MaterialisedWarning,
                stacklevel=2,
            )

    def adapted(params: Any, adapter: Any, *args: Any, key: jax.Array | None = None, **kwargs: Any) -> Any:
        adapter = as_adapter(adapter, plan.sites)
        params = _with_full_copies(params, adapter)
        traced = tracing.trace(fn, params, args, kwargs)
        rate = plan.config.dropout
        key = key if rate > 0 else None
        where = {path: i for i, path in enumerate(traced.paths)}
        inputs = list(traced.inputs)
        check_params(plan.sites, {p: inputs[i].shape for p, i in where.items()})
        for site in adapter.sites:
            if not site.is_full:
                i = where[site.path]
                own = None if key is None else site_key(key, site)
                a, b = adapter.factors(site)
                inputs[i] = lora_weight(site, inputs[i], a, b, own, dropout_rate=rate, implementation=implementation)
        interpreter = Interpreter(report, drops=key is not None)
        return traced.rebuild(interpreter.run_dense(traced.jaxpr, traced.consts, inputs))

    return adapted


def _refuse_own_key(fn: Callable[..., Any]) -> None:
    try:
        names = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return
    if "key" in names:
        raise ValueError(
            "`fn` has an argument named `key`, which here means the key of the low-rank branch's dropout. Wrap it: "
            "`lambda params, x, noise: fn(params, x, key=noise)`."
        )


def check_params(sites: tuple[Site, ...], shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> None:
    """Raises one error naming every site that `params` lacks or has in another shape."""
    problems = [
        f"`{s.name}` is missing" if s.path not in shapes else f"`{s.name}` is {shapes[s.path]}, planned {s.shape}"
        for s in sites
        if tuple(shapes.get(s.path, ())) != s.shape
    ]
    if problems:
        raise ValueError(
            "the parameters are not those the plan was made for: " + "; ".join(problems[:8]) + ". Plan again with "
            "these parameters."
        )


def _with_full_copies(params: Any, adapter: Adapter) -> Any:
    """`params` with the parameters of `modules_to_save` replaced by the adapter's trained copies."""
    full = {site.path: site for site in adapter.sites if site.is_full}
    if not full:
        return params
    paths, leaves, tree = tracing.flatten_params(params)
    check_params(tuple(full.values()), {p: x.shape for p, x in zip(paths, leaves, strict=True)})
    swapped = [adapter.leaf(p).astype(x.dtype) if p in full else x for p, x in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(tree, swapped)
