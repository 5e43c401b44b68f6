"""LoftQ: factors that make up for what quantising the base takes away."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import _compat, tracing
from lora_jax.adapters import Adapter
from lora_jax.algebra import as_factors, first
from lora_jax.inits.assemble import Pair, adapter_of, balanced, check_ranks, low_rank, weights_of
from lora_jax.inits.matrices import as_matrices, as_parameter
from lora_jax.merging import refuse_shared
from lora_jax.planning import Plan
from lora_jax.quant import dequantise, quantise, round_trip_int8
from lora_jax.sites import Site

RoundTrip = Callable[[jax.Array], jax.Array]


def loftq(
    plan: Plan,
    params: Any,
    *,
    bits: int = 4,
    iterations: int = 1,
    block: int = 64,
    round_trip: RoundTrip | None = None,
) -> tuple[Adapter, Any]:
    """A quantised base and factors with Q + s·A·B close to W: alternately Q = quantised(W - s·A·B) and A, B from the
    SVD of W - Q. Deterministic.

    **Arguments:**

    - `bits`: 8 for int8 with one scale for each output, fewer for a NormalFloat (4: NF4) in blocks of `block` along
      the rows that PyTorch stores.
    - `iterations`: how often; 1 quantises W and fits what it lost.
    - `round_trip`: your own quantiser in place of these, `(out, in) matrix -> dequantised matrix`.

    **Returns:** `(adapter, new_params)`. The new base holds the dequantised values in its own dtype, so that
    quantising it again by the same method gives the same codes. `params` minus its loss is not low-rank:
    `to_original` refuses such an adapter.

    **Raises:** `ValueError` for bits or iterations out of range, or a rank above a side of the weight.

    **Source:** Li et al., arXiv:2310.08659, algorithm 1. PEFT leaves out s (which is 1 if alpha equals the rank), so
    that its Q + s·A·B moves away from W for any other alpha; here it does not.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"`iterations={iterations!r}` must be a positive whole number, e.g. 1.")
    if round_trip is None:
        round_trip = _builtin(bits, block)
    check_ranks("loftq", plan)
    weights = weights_of(plan, params)
    bases: dict[tuple[str, ...], jax.Array] = {}
    pairs: dict[tuple[str, ...], Pair] = {}
    for site in low_rank(plan):
        nameless = dataclasses.replace(site, path=("",))
        bases[site.path], *pair = _alternate(
            jnp.asarray(weights[site.path]), site=nameless, iterations=iterations, dtype=str(plan.config.dtype),
            round_trip=round_trip,
        )  # fmt: skip
        pairs[site.path] = pair[0], pair[1]
    adapter = adapter_of(plan, params, pairs, bases=bases)
    paths, leaves, tree = tracing.flatten_params(params)
    refuse_shared(paths, leaves, adapter)
    return adapter, jax.tree.unflatten(tree, [bases.get(p, x) for p, x in zip(paths, leaves, strict=True)])


@functools.cache
def _builtin(bits: int, block: int) -> RoundTrip:
    if bits == 8:
        return round_trip_int8
    quantise(jnp.zeros(1), bits, block)  # raises before any work is done
    return functools.partial(_normal_float, bits, block)


def _normal_float(bits: int, block: int, w: jax.Array) -> jax.Array:
    return dequantise(quantise(w, bits, block), w.shape, bits)


@functools.partial(jax.jit, static_argnames=("site", "iterations", "dtype", "round_trip"))
def _alternate(
    w: jax.Array, *, site: Site, iterations: int, dtype: str, round_trip: RoundTrip
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The dequantised base, A and B."""
    m = as_matrices(site, w)
    is_table = site.op == "embedding"

    def quantised(w: jax.Array) -> jax.Array:
        # PyTorch stores (out, in), tables (rows, features); what is stored is rounded to the base's dtype.
        stored = w if is_table else jnp.swapaxes(w, -1, -2)
        back = jax.vmap(round_trip)(stored)
        back = back if is_table else jnp.swapaxes(back, -1, -2)
        return back.astype(site.dtype).astype(m.dtype)

    target = m
    with jax.default_matmul_precision("highest"):
        while True:
            base = quantised(target)
            u, s, vh = first(site.rank, *jnp.linalg.svd(m - base, full_matrices=False))
            if (iterations := iterations - 1) == 0:
                a, b = as_factors(site, *balanced(site, u, s, vh), dtype)
                return _compat.laid_out_as(as_parameter(site, base).astype(site.dtype), w), a, b
            target = m - (u * s[..., None, :]) @ vh
