"""Adapters made by hand: random factors for parameters of given shapes and roles, without a model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import lora_jax as lj
from lora_jax import reference
from lora_jax.sites import LORA_A, LORA_B, Atom
from tests.core.harness import rng

# Name: shape and roles. A plain kernel, one stored the other way round with heads, a stack, a convolution, a table.
SHAPES = {
    "q.kernel": ((7, 5), "io"),
    "o.kernel": ((2, 3, 6), "oii"),
    "stack.kernel": ((3, 6, 4), "lio"),
    "conv.kernel": ((2, 2, 3, 4), "iiio"),
    "table.embedding": ((9, 4), "io"),
}


def site_of(name: str, rank: int, alpha: float, rslora: bool = False, dtype: str = "float64") -> lj.Site:
    shape, roles = SHAPES[name]
    op = "embedding" if name.endswith("embedding") else "conv" if name.startswith("conv") else "linear"
    atoms = tuple(Atom(d, 1, n) for d, n in enumerate(shape))
    return lj.Site(tuple(name.split(".")), shape, dtype, op, atoms, roles, rank, alpha, rslora)


def adapter_of(
    seed: int,
    rank: int = 3,
    alpha: float = 4.0,
    names: Any = tuple(SHAPES),
    rslora: bool = False,
    dtype: Any = np.float64,
) -> lj.Adapter:
    """Random factors of about the same size for every parameter."""
    leaves: dict[tuple[str, ...], Any] = {}
    sites = tuple(site_of(name, rank, alpha, rslora) for name in names)
    for n, site in enumerate(sites):
        for factor, shape in ((LORA_A, site.a_shape), (LORA_B, site.b_shape)):
            values = rng(seed, n, len(factor) + (factor == LORA_B)).standard_normal(shape)
            leaves[site.leaf_path(factor)] = jax.numpy.asarray(values.astype(dtype))
    return lj.Adapter.from_leaves(leaves, sites)


def changes(adapter: lj.Adapter) -> dict[str, np.ndarray]:
    """`{name: scale * A @ B}` in float64, by the reference."""
    return {site.name: reference.delta(site, *adapter.factors(site)) for site in adapter.sites}


def size_of(adapter: lj.Adapter) -> dict[str, np.ndarray]:
    """The same sums of magnitudes."""
    return {
        site.name: abs(reference.delta(site, *(abs(np.asarray(x)) for x in adapter.factors(site))))
        for site in adapter.sites
    }


def worst(got: dict[str, np.ndarray], want: dict[str, np.ndarray], dtype: Any = np.float64, terms: int = 200) -> float:
    """The largest error over its bound: of a matrix, relative to its norm."""
    assert got.keys() == want.keys()
    return max(
        reference.excess(got[name], want[name], reference.tolerance(dtype, terms) * np.linalg.norm(want[name]))
        for name in want
    )
