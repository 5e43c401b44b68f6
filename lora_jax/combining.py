"""`combine`: a weighted sum of adapters as one adapter, exactly or by one of the published approximations."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.editing import check_number, check_only_factors, resized, ungrouped
from lora_jax.reductions import MAJORITIES, REDUCTIONS
from lora_jax.sites import LORA_A, LORA_B, Site
from lora_jax.weighted import SVD, How, combined

METHODS = ("cat", "svd", *REDUCTIONS, *(name + SVD for name in REDUCTIONS if name != "linear"))


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | jax.Array,
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    clamp: float | None = None,
    key: jax.Array | None = None,
) -> Adapter:
    """One adapter for the weighted sum of several: PEFT's `add_weighted_adapter` as a pure function.

    With `c_i = weights[i] * scale_i` and `D_i = scale_i A_i B_i`:

    - `"cat"`: A = [c_i A_i], B = [B_i] side by side. Exact; the rank is the sum of the ranks.
    - `"svd"`: the best approximation of `sum weights[i] D_i` of rank `rank`, from the thin factors.
    - `"linear"`: A = sum sign(c_i) sqrt|c_i| A_i, B = sum sqrt|c_i| B_i, for equal ranks. Cheap, and far from the sum
      of the changes: it has cross terms A_i B_j.
    - `"magnitude_prune"`, `"ties"`, `"dare_linear"`, `"dare_ties"`: as `"linear"`, with the factors pruned to
      `density` first (the largest elements, or by chance and divided by `density`); the two of ties also leave out
      what is not of the elected sign, and take the mean of the rest.
    - the same names with `"_svd"`: the reduction on the changes D_i, which are formed one parameter at a time, and
      then the SVD.

    **Arguments:**

    - `weights`: one finite number for each adapter, of any sign; or an array of shape (n,), which may be traced.
    - `rank`: of the methods with an SVD; the largest of the adapters' ranks at a parameter if None.
    - `density`: in (0, 1], share of elements that pruning keeps.
    - `majority_sign`: `"total"` elects the sign of the sum, `"frequency"` that of most adapters.
    - `clamp`: with an SVD, bounds the elements of A and B by this quantile of all of them.
    - `key`: for `"dare_*"`; each adapter, parameter and factor draws its own elements.

    **Returns:** an adapter for every parameter that any of them adapts, of scale 1 (alpha = rank, no rsLoRA), with
    ordinary factors also where QALoRA's went in. A parameter that some of them leave alone is made of those that adapt
    it. Stacked layers and experts are pruned and decomposed each for itself.

    **Raises:** `ValueError` for what the method does not take, and for adapters that no weighted sum of factors
    describes (`modules_to_save`, DoRA), that split a parameter differently, or whose ranks differ where the method
    adds factors.

    **Source:** PEFT 0.21's formulas, except that rsLoRA's scale is not applied twice and nothing is left out silently.
    """
    if isinstance(adapters, Adapter):
        raise TypeError("`adapters` is one Adapter: write a list, [adapter].")
    adapters = list(adapters)
    _check_arguments(adapters, weights, method, rank, density, majority_sign, clamp, key)
    adapters = [ungrouped(adapter) for adapter in adapters]
    groups = _by_path(adapters)
    _check_sites(groups, method)
    how = How(method, density, majority_sign, clamp)
    sites, leaves = [], {}
    for group in groups.values():
        some = next(iter(group.values()))
        ranks = [site.rank for site in group.values()]
        wanted = (rank or max(ranks)) if method.endswith("svd") else sum(ranks) if method == "cat" else some.rank
        site = resized(some, wanted, 1.0)
        a, b = combined(
            [adapters[i].factors(site) for i, site in group.items()],
            [weights[i] for i in group],
            None if key is None else jax.random.fold_in(key, site.seed),
            # Without its path, a site says no more than its shapes: layers of one shape share one compilation.
            sites=tuple(replace(one, path=("",)) for one in group.values()),
            target=replace(site, path=("",)),
            how=how,
        )
        sites.append(site)
        leaves[site.leaf_path(LORA_A)], leaves[site.leaf_path(LORA_B)] = a, b
    return Adapter.from_leaves(leaves, tuple(sites))


# For one parameter: the adapters that adapt it, by position, each with its site.
Group = dict[int, Site]


def _by_path(adapters: Sequence[Adapter]) -> dict[tuple[str, ...], Group]:
    groups: dict[tuple[str, ...], Group] = {}
    for i, adapter in enumerate(adapters):
        for site in adapter.sites:
            groups.setdefault(site.path, {})[i] = site
    return groups


def _check_arguments(
    adapters: list[Adapter], weights: Any, method: str, rank: int | None, density: float | None,
    majority_sign: str, clamp: float | None, key: Any,
) -> None:  # fmt: skip
    if method not in METHODS:
        close = difflib.get_close_matches(str(method), METHODS, n=1)
        raise ValueError(f"`method={method!r}` is unknown; use one of {', '.join(close or METHODS)}.")
    if not adapters:
        raise ValueError("`adapters` is empty: there is nothing to combine.")
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, Adapter):
            raise TypeError(f"`adapters[{i}]` is a {type(adapter).__name__}, not an Adapter, which knows its scales.")
        check_only_factors(adapter.sites, f"`combine` cannot take `adapters[{i}]`")
    if not isinstance(weights, Sequence | np.ndarray | jax.Array) or isinstance(weights, str):
        raise TypeError(f"`weights` is a {type(weights).__name__}: write a list with one number for each adapter.")
    if len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give each adapter one.")
    for i, weight in enumerate(weights if not isinstance(weights, jax.Array) else ()):
        if isinstance(weight, jax.Array):
            continue  # it may be traced
        check_number(f"weights[{i}]", weight)
        if not math.isfinite(weight):
            raise ValueError(f"`weights[{i}]={weight!r}` must be a finite number.")
    base, has_svd = method.removesuffix(SVD), method.endswith("svd")
    prunes, elects = REDUCTIONS.get(base, ("", False))
    problems = []
    if prunes and (density is None or not 0 < density <= 1):
        problems.append(f"needs `density` in (0, 1], got {density!r}")
    if not prunes and density is not None:
        problems.append(f"prunes nothing, so `density={density}` would have no effect")
    if majority_sign not in MAJORITIES:
        problems.append(f"`majority_sign={majority_sign!r}` is none of {', '.join(MAJORITIES)}")
    if not elects and majority_sign != "total":
        problems.append(f"elects no signs, so `majority_sign={majority_sign!r}` would have no effect")
    if prunes == "random" and key is None:
        problems.append("draws by chance and needs a `key`, e.g. `jax.random.key(0)`")
    if prunes != "random" and key is not None:
        problems.append("draws nothing, so `key` would have no effect")
    if not has_svd and (rank is not None or clamp is not None):
        problems.append("has no SVD, so `rank` and `clamp` would have no effect; change ranks with `resize`")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        problems.append(f"`rank={rank!r}` must be a positive whole number")
    if clamp is not None and not 0 < clamp <= 1:
        problems.append(f"`clamp={clamp!r}` is a quantile, in (0, 1]")
    if problems:
        raise ValueError(f"`method={method!r}`: " + "; ".join(problems) + ".")


def _check_sites(groups: dict[tuple[str, ...], Group], method: str) -> None:
    problems = []
    for group in groups.values():
        (i, one), *others = group.items()
        for j, other in others:
            if (one.shape, one.atoms, one.roles) != (other.shape, other.atoms, other.roles):
                problems.append(
                    f"`{one.name}` is {one.shape} with roles {one.roles!r} in `adapters[{i}]` and {other.shape} with "
                    f"{other.roles!r} in `adapters[{j}]`: they are not of one model, or were planned differently"
                )
            elif method in REDUCTIONS and one.rank != other.rank:
                problems.append(
                    f"`{one.name}` has rank {one.rank} in `adapters[{i}]` and {other.rank} in `adapters[{j}]`, and "
                    f"{method!r} adds their factors element by element: use 'cat' or a method with an SVD, or "
                    "`resize` them first"
                )
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError("these adapters cannot be combined: " + "; ".join(problems[:4]) + more + ".")
