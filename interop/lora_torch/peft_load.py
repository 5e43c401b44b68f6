"""Adapters from Hugging Face PEFT directories; see `peft_dir` for the way out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import products
from lora_jax.adapters import Adapter
from lora_jax.peft_matching import is_target, pattern_values
from lora_jax.planning import Plan
from lora_jax.reference import SAME_PRODUCT
from lora_jax.sites import LORA_A, LORA_B, LORA_BIAS, TOKENS, Site
from lora_jax.tracing import flatten_params

from .arrays import convert, ops_of
from .naming import Naming, nearest
from .peft_full import match_aliases
from .peft_keys import PARAMETER_ORDER, PREFIX, VECTORS, keys_of
from .peft_names import Names, as_naming, full_entries, places, torch_path, with_stacks
from .peft_read import AdapterFile, read_sorted
from .peft_settings import group_of, scaling
from .peft_tensors import Factors, Joined, Placement, from_modules
from .peft_tensors import tied as tied_factors
from .peft_tokens import token_leaves
from .problems import Problems
from .resolve import Entry, resolve
from .trees import Leaf

# Alphas that went through a change of rank and back agree to rounding only.
_SAME_ALPHA = 1e-9
# Looking for near names compares every pair; after this many a reader has seen the pattern.
_HINTS = 20


def load_peft(
    directory: str | Path,
    plan_or_sites: Plan | Sequence[Site],
    *,
    names: Names = None,
    tied: Mapping[str, str] | None = None,
    params: Any = None,
    dtype: Any = None,
    parameter_order: Sequence[str] = PARAMETER_ORDER,
) -> Adapter:
    """The adapter in a PEFT directory.

    Ranks come from the tensors, alphas from the configuration.

    - With a **plan** they must be the plan's, since `lora_jax.apply` computes with the plan's ranks and scales;
      `plan_peft` makes the plan that fits. Factors take the plan's dtype, copies of `modules_to_save` the wider of
      it and the base's.
    - With **sites** the returned adapter's sites carry the file's rank, alpha and rsLoRA: enough for
      `lora_jax.merge`. Factors keep the file's dtype.

    Layers of unequal rank that are stacked here are padded with zeros, layers that the configuration leaves out are
    zeros altogether; unequal scales in one stack are folded into B. A fused kernel whose torch modules have different
    A gets the sum of their ranks.

    **Arguments:**

    - `names`, `tied`, `parameter_order`: as in `save_peft`.
    - `params`: the base's parameters. PEFT stores the base weight beside the factors of a targeted embedding; with
        `params` it is compared and must be equal, without it such a file is refused.
    - `dtype`: in place of the plan's or the file's.

    **Raises:** `FileNotFoundError`, or one `ValueError` listing every key that is unknown, missing, misshapen or
    would overwrite the base, every module the plan lacks, and every rank or alpha that differs from the plan's.
    """
    fixed = isinstance(plan_or_sites, Plan)
    sites = plan_or_sites.sites if isinstance(plan_or_sites, Plan) else tuple(plan_or_sites)
    if dtype is None and isinstance(plan_or_sites, Plan):
        dtype = plan_or_sites.config.dtype
    file = widen(read_sorted(directory), dtype)
    found, leaves = read_sites(file, sites, as_naming(names), tied, params, parameter_order)
    if fixed:
        _must_agree(file, sites, found)
        found = sites
    full = {site.path: site.dtype for site in sites if site.is_full}
    out = {}
    for path, x in leaves.items():
        kind = x.dtype if dtype is None else jnp.promote_types(full[path], dtype) if path in full else jnp.dtype(dtype)
        out[path] = _as_jax(x, kind, ".".join(path))
    return Adapter.from_leaves(out, found)


def widen(file: AdapterFile, dtype: Any) -> AdapterFile:
    """The file with factors at least as precise as `dtype`, so that folding a scale into B rounds no earlier."""
    if dtype is not None:
        for pair in file.pairs.values():
            pair.update({key: x.astype(jnp.promote_types(x.dtype, dtype)) for key, x in pair.items()})
    return file


def read_sites(
    file: AdapterFile,
    sites: Sequence[Site],
    naming: Naming,
    tied: Mapping[str, str] | None = None,
    params: Any = None,
    parameter_order: Sequence[str] = PARAMETER_ORDER,
) -> tuple[tuple[Site, ...], dict[tuple[str, ...], np.ndarray]]:
    """The sites as the file has them, and all leaves, in numpy. **Raises** as `load_peft`."""
    placed = places(sites, naming, tied)
    keys = keys_of(placed, parameter_order)
    shapes = {site.path: np.empty(site.shape, site.dtype) for site in sites if site.is_full}
    entries = full_entries(sites, naming, shapes)
    match_aliases(file, sites, entries, tied)
    _fill_layers(file, placed, keys)
    _match_names(file, placed, keys, entries, tied or {})
    _check_bases(file, sites, naming, tied or {}, params)
    group = group_of(file.config)
    file.problems += [
        f"`{site.name}`: the file's lora_A stands for {group} inputs each, the plan's for {site.group} (QALoRA)"
        for site in sites
        if site.is_low_rank and site.group != group
    ]
    joined = {place.site.path: _join(file, place, keys) for place in placed}
    rows = token_leaves(file, sites, naming)
    file.raise_if_any()
    whole = {entry.leaf.path: entry for entry in entries}
    new: list[Site] = []
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for site in sites:
        if site.tokens:
            new.append(site)
            leaves[site.leaf_path(TOKENS)] = rows[site.leaf_path(TOKENS)]
        elif site.is_full:
            entry = whole[torch_path(site)]
            new.append(site)
            pieces = [file.full[name] for name in entry.names]
            leaves[site.path] = entry.layout.from_torch(pieces, ops_of("numpy"))
        else:
            factors, alpha = joined[site.path]  # type: ignore[misc]  # no problems: all are there
            on = {field: bool(file.config.get(f"use_{field}")) for field in ("rslora", "dora")}
            on["lora_bias"] = bool(file.config.get("lora_bias"))
            new.append(replace(site, rank=factors.rank, alpha=alpha, **on))
            named = {LORA_A: factors.a, LORA_B: factors.b, **factors.vectors}
            leaves |= {site.leaf_path(name): value for name, value in named.items()}
    return tuple(new), leaves


def _fill_layers(file: AdapterFile, placed: Sequence[Placement], keys: Mapping[str, tuple[str, str]]) -> None:
    """Zeros for the layers of a stack that the configuration leaves out, which change nothing and never train."""
    for place in placed:
        pairs = {name: file.pairs.get(_module(keys[name][0])) for name in place.names}
        there = next((pair for pair in pairs.values() if pair and set(pair) == {"A", "B"}), None)
        if there is None or place.kind not in ("linear", "embedding"):
            continue
        for name, pair in pairs.items():
            if pair is None and not is_target(file.config, name) and file.config.get("use_dora"):
                file.problems.append(
                    f"`{place.site.name}` stacks {name}, which is not adapted, with layers that are: with DoRA its "
                    "magnitude would have to be the norm of its base, which the file does not hold"
                )
            elif pair is None and not is_target(file.config, name):
                rank = (pattern_values(file.config.get("rank_pattern"), name) or [file.config.get("r", 8)])[0]
                a, b = there["A"], there["B"]
                zeros = {"A": np.zeros((rank, *a.shape[1:]), a.dtype), "B": np.zeros((b.shape[0], rank), b.dtype)}
                file.pairs[_module(keys[name][0])] = zeros
                if file.config.get("lora_bias"):
                    file.extras.setdefault(_module(keys[name][0]), {})[LORA_BIAS] = np.zeros(b.shape[0], b.dtype)
                if place.kind == "embedding":
                    file.embeddings.add(_module(keys[name][0]))


def _match_names(
    file: AdapterFile,
    placed: Sequence[Placement],
    keys: Mapping[str, tuple[str, str]],
    entries: Sequence[Entry],
    tied: Mapping[str, str],
) -> None:
    """Notes modules and whole tensors that only the file has, or only the sites."""
    wanted = {_module(a): (name, place) for place in placed for name in _all(place) for a, _ in [keys[name]]}
    for module, (name, place) in wanted.items():
        if module not in file.pairs:
            why = ", the same table: what changes its lookup alone has no form here" if name in place.heads else ""
            file.problems.append(f"missing: {PREFIX}{module}, for `{place.site.name}`{why}")
    unexpected = [module for module in file.pairs if module not in wanted]
    for n, module in enumerate(unexpected):
        hint = nearest(module, wanted) if n < _HINTS else ""
        if table := tied.get(f"{module}.weight"):
            hint = f": it is {table} here, and what changes the head alone has no form"
        file.problems.append(f"unexpected: {PREFIX}{module} is not in the plan{hint}")
    full = {name: entry for entry in entries for name in entry.names}
    for name, entry in full.items():
        if name not in file.full:
            file.problems.append(f"missing: {PREFIX}{name}, for `{entry.leaf}`, which is trained in full")
        elif file.full[name].shape != entry.layout.torch_shape:
            file.problems.append(f"{PREFIX}{name} is {file.full[name].shape}, expected {entry.layout.torch_shape}")
    for name in file.full:
        if name not in full:
            file.problems.append(
                f"unexpected: {PREFIX}{name} is a whole tensor; plan with its module in `modules_to_save`"
            )


def _join(file: AdapterFile, place: Placement, keys: Mapping[str, tuple[str, str]]) -> tuple[Joined, float] | None:
    """The factors of one site and its alpha, or None with the reason among the problems."""
    modules: dict[str, Factors] = {}
    alphas: dict[str, float] = {}
    count = math.prod(atom.size for atom in place.experts)
    for name in _all(place):
        module = _module(keys[name][0])
        pair = file.pairs.get(module, {})
        if set(pair) != {"A", "B"}:
            continue  # noted already
        a, b = pair["A"], pair["B"]
        if (module in file.embeddings) != (place.kind == "embedding" and name not in place.heads):
            file.problems.append(f"{module}: an embedding's factors, or a linear layer's, where the other is due")
            continue
        want_a, want_b = (place.a_rest, (place.out_size,)) if name not in place.heads else (
            (place.out_size,), place.a_rest)  # fmt: skip
        rank, part = a.shape[0] // count, a.shape[0] // place.groups
        window = (1,) * (len(place.a_rest) - 1) if place.kind == "conv" else ()
        if a.shape != (rank * count, *want_a) or b.shape != (*want_b, part, *window) or rank == 0:
            file.problems.append(
                f"{module}: lora_A {a.shape}, lora_B {b.shape} do not fit `{place.site.name}` {place.site.shape}, "
                f"which takes (r{f'*{count}' if count > 1 else ''}, {', '.join(map(str, want_a))}) and "
                f"({', '.join(map(str, want_b))}, r)"
            )
            continue
        try:
            alphas[name], scale = scaling(file.config, name, rank)
            vectors = {n: x for n, x in file.extras.get(module, {}).items() if n in VECTORS}
            modules[name] = Factors(a, b, scale, count, vectors)
        except ValueError as error:
            file.problems.append(str(error))
    if set(modules) != set(_all(place)):
        return None
    if place.heads and any(factors.vectors for factors in modules.values()):
        file.problems.append(
            f"{place.names[0]} and {place.heads[0]} are one weight here; DoRA gives each a magnitude of its own side"
        )
        return None
    for table, head in zip(place.names, place.heads, strict=False):
        other = tied_factors(modules[head])
        if not _same_product(modules[table], other):
            file.problems.append(f"{table} and {head} are one weight here, but the file adapts them differently")
            return None
    try:
        joined = from_modules(place, {name: modules[name] for name in place.names})
    except ValueError as error:
        file.problems.append(str(error))
        return None
    own = {(alphas[name], modules[name].rank) for name in place.names}
    if len(own) == 1 and own == {(alphas[place.names[0]], joined.rank)}:
        return joined, alphas[place.names[0]]
    alpha = joined.scale * (math.sqrt(joined.rank) if file.config.get("use_rslora") else joined.rank)
    return joined, place.site.alpha if math.isclose(alpha, place.site.alpha, rel_tol=_SAME_ALPHA) else alpha


def _same_product(one: Factors, other: Factors) -> bool:
    """Whether two pairs are equal, or equal up to how they are factored."""
    if one.scale == other.scale and np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b):
        return True
    (b1, a1), (b2, a2) = ((f.scale * f.b.astype(np.float64), f.a.astype(np.float64)) for f in (one, other))
    if b1.shape[0] != b2.shape[0] or a1.shape[1] != a2.shape[1]:
        return False
    # The products themselves may be as large as a vocabulary's table.
    size = max(products.frobenius(b1, a1), products.frobenius(b2, a2))
    return products.distance(b1, a1, b2, a2) <= SAME_PRODUCT * size


def _check_bases(
    file: AdapterFile, sites: Sequence[Site], naming: Naming, tied: Mapping[str, str], params: Any
) -> None:
    """PEFT stores a targeted embedding's own weight: it must be the base's, since nothing here replaces it."""
    if not file.bases:
        return
    if params is None:
        file.problems += [
            f"{PREFIX}{module}.base_layer.weight is the base's weight, which PEFT stores beside a targeted embedding: "
            "pass `params=` to have it compared"
            for module in file.bases
        ]
        return
    naming = with_stacks(sites, naming)
    # A head tied to an embedding has no parameter of its own: its base is the table.
    names = {module: tied.get(f"{module}.weight", f"{module}.weight") for module in file.bases}
    shapes = {names[module]: value.shape for module, value in file.bases.items()}
    paths, values, _ = flatten_params(params)
    by_name: dict[str, np.ndarray] = {}
    for path, value in zip(paths, values, strict=True):
        path = path[1:] if path[0] == "params" else path
        if any(name in shapes for name in naming.target(path, value.ndim).names):
            leaf = Leaf(path, value, tuple(value.shape), np.dtype(value.dtype))
            for entry in resolve([leaf], naming, shapes, Problems()):
                pieces = entry.layout.to_torch(convert(value, "numpy"), ops_of("numpy"))
                by_name |= zip(entry.names, pieces, strict=True)
    for module, stored in file.bases.items():
        ours = by_name.get(names[module])
        if ours is None:
            file.problems.append(f"no parameter corresponds to {module}, whose base weight the file holds")
        elif ours.shape != stored.shape or not np.array_equal(ours.astype(stored.dtype), stored):
            file.problems.append(
                f"{PREFIX}{module}.base_layer.weight {stored.shape} is not the base's weight {ours.shape}: the adapter "
                "was trained on another base, or its vocabulary was changed"
            )


def _must_agree(file: AdapterFile, planned: Sequence[Site], found: Sequence[Site]) -> None:
    for want, have in zip(planned, found, strict=True):
        if not want.is_low_rank:
            continue
        if (
            want.vectors != have.vectors
            or want.rank != have.rank
            or not math.isclose(want.scale, have.scale, rel_tol=_SAME_ALPHA)
        ):
            file.problems.append(
                f"`{want.name}`: the file has {_settings(have)}, the plan {_settings(want)}. Make the plan with "
                "`plan_peft`, or pass `plan.sites` for an adapter to merge"
            )
    file.raise_if_any()


def _settings(site: Site) -> str:
    more = [name for name, on in (("rsLoRA", site.rslora), ("DoRA", site.dora), ("lora_bias", site.lora_bias)) if on]
    return f"rank {site.rank}, alpha {site.alpha:g}{' with ' if more else ''}{' and '.join(more)}"


def _as_jax(x: np.ndarray, dtype: np.dtype, name: str) -> Any:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"`{name}`: jax keeps no {dtype.name} unless jax_enable_x64 is set; pass `dtype='float32'`")
    return jnp.asarray(x.astype(dtype))


def _all(place: Placement) -> tuple[str, ...]:
    return (*place.names, *place.heads)


def _module(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
