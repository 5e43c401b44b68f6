"""Adapters between a Flax model adapted by lora_jax and a torch model adapted by anything in `dialects`.

    state = adapter_to_torch(adapter, "torchtune", names="linen")      JAX -> a state dict
    load_torch_adapter(model, adapter, names="linen")                  JAX -> a live model, scales compared
    adapter = adapter_from_torch(model, plan, names="linen")           either -> JAX, scales compared for a model

The base goes by `to_torch_state_dict`, `from_torch_state_dict` and `translate`; optimizer states by `optimizer_state`;
adapters trained by PEFT elsewhere by `plan_peft`, which reads what there is to adapt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, expected_leaves
from lora_jax.planning import Plan
from lora_jax.sites import LORA_A, LORA_B, Site
from lora_jax.sites import MAGNITUDE as LEAF

from .arrays import KINDS, Kind, convert, kind_of, ops_of, shape_dtype
from .checks import kept_by
from .dialects import (
    MAGNITUDE,
    PARTS,
    A,
    B,
    DialectName,
    Tensors,
    check_bias,
    check_dialect,
    put_together,
    take_apart,
)
from .live_models import check_scales, check_writable, dialect_of, raise_together
from .naming import nearest
from .peft_full import full_tensors
from .peft_names import Names, as_naming, full_entries, places, torch_path
from .peft_tensors import Factors, Placement, from_modules, to_modules
from .torchtune_names import TuneDecoder

_PEFT = ("peft", "peft-file")
# What the adapters here are called beside the dialects of torch.
_JAX = "lora_jax"
# One number for each output: the leaf here, the part there.
_VECTORS = {LEAF: MAGNITUDE}
_CALLED = {A: "lora_A", B: "lora_B", MAGNITUDE: "magnitude"}


def adapter_to_torch(
    adapter: Adapter,
    dialect: DialectName,
    *,
    names: Names = None,
    adapter_name: str = "default",
    decoder: TuneDecoder | None = None,
    kind: Kind = "torch",
    copy: bool = False,
) -> dict[str, Any]:
    """The adapter's tensors under the names of a torch model.

    **Arguments:**

    - `dialect`: see `lora_torch.dialects`. `names`: as in `save_peft`. `decoder`: as in `translate`.
    - `kind`: `"torch"`, `"numpy"` or `"jax"`. `copy`: False lets tensors share memory with the adapter, see
        `lora_torch.arrays`.

    **Returns:** names to contiguous arrays in the factors' dtype: A (rank, in) and B (out, rank), a pair for each layer
    of a stack, with DoRA's magnitudes (out,), and the whole tensors of `modules_to_save`.

    A DoRA layer of torchtune multiplies its bias by the magnitude, one here does not: give it none.
    `load_torch_adapter` refuses a layer that has one.

    **Raises:** `ValueError` listing every site that is no linear layer in torch, or has no name.
    """
    check_dialect(dialect)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {list(KINDS)}")
    naming = as_naming(names)
    ops = ops_of(kind)
    values: dict[tuple[str, str], Any] = {}
    for place in linear_places(adapter.sites, names):
        exact = kind if place.is_plain else "numpy"
        a, b = (convert(x, exact) for x in adapter.factors(place.site))
        vectors = {name: convert(x, exact) for name, x in adapter.vectors(place.site).items()}
        for module, found in to_modules(place, a, b, vectors).items():
            parts = {A: found.a, B: found.b} | {_VECTORS[name]: x for name, x in found.vectors.items()}
            values |= {(module, part): convert(x, kind) for part, x in parts.items()}
    for name, value in _whole(adapter, dialect, naming).items():
        module, _, tensor = name.rpartition(".")
        values[module, tensor] = convert(value, kind)
    if decoder is not None:
        _only_torchtune(dialect)
        values = _moved(values, decoder.to_tune)
    made = put_together(Tensors(values, frozenset()), dialect, adapter_name)
    return {name: ops.copy(x) if copy else x for name, x in ((n, ops.contiguous(x)) for n, x in made.items())}


def adapter_from_torch(
    source: Any,
    plan_or_sites: Plan | Sequence[Site],
    dialect: DialectName | None = None,
    *,
    names: Names = None,
    adapter_name: str = "default",
    decoder: TuneDecoder | None = None,
    dtype: Any = None,
    copy: bool = True,
) -> Adapter:
    """The adapter of a torch model, for `plan`.

    **Arguments:**

    - `source`: a live model, whose scales are compared, or a state dict, which holds none: there rank and alpha must be
        the plan's by your own care. Tensors of the base are passed over.
    - `dialect`: of a state dict; a model tells its own.
    - `names`, `adapter_name`, `decoder`: as in `adapter_to_torch`.
    - `dtype`: of the leaves; None keeps each as it is stored.
    - `copy`: False lets leaves share memory with the model, which must then not be trained further.

    **Raises:** `ValueError` listing every module that only one side adapts, with DoRA or at all, and every shape, rank
    and scale that is not the plan's; for a DoRA layer of torchtune that has a bias.
    """
    sites = plan_or_sites.sites if isinstance(plan_or_sites, Plan) else tuple(plan_or_sites)
    placed = linear_places(sites, names)
    state_dict = source
    if not isinstance(source, Mapping):
        if not hasattr(source, "named_modules"):
            raise TypeError(f"`source` is a {type(source).__name__}: pass a torch model or a state dict")
        state_dict, own = source.state_dict(), dialect_of(source, adapter_name)
        if dialect not in (None, own):
            raise ValueError(f"`dialect={dialect!r}`, but the model's adapters are {own!r}; leave it out")
        dialect = own
        check_scales(source, scales_of(placed, decoder), adapter_name)
    elif dialect is None:
        raise ValueError("say the `dialect` of a state dict: 'lora', 'torchtune', 'peft' or 'peft-file'")
    check_dialect(dialect)
    full = [site for site in sites if site.is_full]
    _refuse_full(full, dialect)
    tensors = take_apart(state_dict, dialect, adapter_name)
    check_bias(tensors, dialect, _JAX)
    values = tensors.values
    if decoder is not None:
        _only_torchtune(dialect)
        values = _moved({key: x for key, x in values.items() if full or key[1] in PARTS}, decoder.to_hf)
    found = Tensors(values, frozenset()).adapters()
    raise_together("the torch adapter does not fit the plan", _problems(found, placed))
    leaves: dict[tuple[str, ...], Any] = {}
    for place in placed:
        scale = place.site.scale
        exact = kind_of(found[place.names[0]][A]) if place.is_plain else "numpy"
        pairs = {}
        for name in place.names:
            parts = {part: convert(x, exact) for part, x in found[name].items()}
            vectors = {leaf: parts[part] for leaf, part in _VECTORS.items() if part in parts}
            pairs[name] = Factors(parts[A], parts[B], scale, vectors=vectors)
        joined = from_modules(place, pairs)
        if joined.rank != place.site.rank:  # a fused kernel whose modules do not share one A
            raise ValueError(
                f"{', '.join(place.names)} have different lora_A, but `{place.site.name}` has one for all of them: its "
                f"rank would be {joined.rank}, not {place.site.rank}. Save the adapter, and plan with `plan_peft`"
            )
        named = {LORA_A: joined.a, LORA_B: joined.b, **joined.vectors}
        leaves |= {place.site.leaf_path(name): x for name, x in named.items()}
    leaves |= _whole_leaves(full, as_naming(names), values)
    return Adapter.from_leaves({path: _to_jax(x, dtype, copy, path) for path, x in leaves.items()}, sites)


def load_torch_adapter(
    model: Any,
    adapter: Adapter,
    *,
    names: Names = None,
    adapter_name: str = "default",
    decoder: TuneDecoder | None = None,
) -> None:
    """Writes a JAX adapter into the adapter of a live torch model, in place: its optimizer keeps its parameters.

    Values are cast to the parameters' dtype and device.

    **Raises:** as `adapter_to_torch`; `ValueError` listing every module that only one side adapts, every shape and
    scale that differs, and layers that are merged or on the meta device. The model is left as it was.
    """
    import torch

    dialect = dialect_of(model, adapter_name)
    check_scales(model, scales_of(linear_places(adapter.sites, names), decoder), adapter_name)
    check_writable(model, adapter_name)
    state = adapter_to_torch(adapter, dialect, names=names, adapter_name=adapter_name, decoder=decoder)
    own = dict(model.named_parameters(remove_duplicate=False))
    tensors = take_apart(own, dialect, adapter_name)
    check_bias(tensors, dialect, _JAX)
    lengths = {(module, part): module for module, part in tensors.values if part == MAGNITUDE}
    named = put_together(Tensors(lengths, frozenset()), dialect, adapter_name)
    problems = [_dora(module) for name, module in named.items() if name not in state]
    problems += [f"the torch model has no parameter {name}{nearest(name, own)}" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(own[name].shape)} in the torch model and {tuple(value.shape)} in JAX"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    raise_together("the JAX adapter does not fit the torch model", problems)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def linear_places(sites: Sequence[Site], names: Names) -> list[Placement]:
    """Where each low-rank site goes. **Raises** `ValueError` for those that are no linear layers, or train more."""
    placed = places(sites, as_naming(names))
    problems = [
        f"`{place.site.name}` is of kind {place.kind!r} in PyTorch: use `save_peft` and `load_peft` for it"
        for place in placed
        if place.kind != "linear"
    ]
    for site in sites:
        more = set(expected_leaves((site,))) - {site.leaf_path(name) for name in (LORA_A, LORA_B, *_VECTORS)}
        if more and not site.is_full:
            leaves = ", ".join(".".join(path) for path in sorted(more))
            problems.append(f"`{site.name}` also trains {leaves}: use `save_peft` and `load_peft` for it")
    raise_together("only linear layers, and of them A, B and magnitudes, can be exchanged in memory", problems)
    return placed


def scales_of(placed: Sequence[Placement], decoder: TuneDecoder | None) -> dict[str, float]:
    """The scale of each torch module."""
    plain = {name: place.site.scale for place in placed for name in place.names}
    return plain if decoder is None else {decoder.to_tune(name, A, None)[0]: x for name, x in plain.items()}


def _problems(found: Mapping[str, Mapping[str, Any]], placed: Sequence[Placement]) -> list[str]:
    wanted = {name: place for place in placed for name in place.names}
    out = []
    for name, place in wanted.items():
        parts = found.get(name, {})
        wants = (A, B, MAGNITUDE) if place.site.dora else (A, B)
        if missing := [_CALLED[part] for part in wants if part not in parts]:
            out.append(f"{name}: no {' and no '.join(missing)}, for `{place.site.name}`{nearest(name, found)}")
            continue
        shapes = tuple(shape_dtype(parts[part])[0] for part in (A, B))
        rank = place.site.rank
        if shapes != ((rank, *place.a_rest), (place.out_size, rank)):
            out.append(
                f"{name}: lora_A {shapes[0]}, lora_B {shapes[1]} are not the plan's {(rank, *place.a_rest)}, "
                f"{(place.out_size, rank)}; plan with the rank that they have"
            )
        if place.site.dora and (length := shape_dtype(parts[MAGNITUDE])[0]) != (place.out_size,):
            out.append(f"{name}: the magnitude is {length}, not the plan's {(place.out_size,)}")
    for name, parts in found.items():
        if name not in wanted:
            out.append(f"{name} is adapted, but not in the plan{nearest(name, wanted)}")
        elif MAGNITUDE in parts and not wanted[name].site.dora:
            out.append(_dora(name))
    return out


def _dora(module: str) -> str:
    return f"{module} has a DoRA magnitude in the torch model, and none in JAX: plan with `use_dora=True`"


def _whole(adapter: Adapter, dialect: str, naming: Any) -> dict[str, Any]:
    """The copies of parameters trained in full, which are ordinary tensors except in PEFT."""
    full = [site for site in adapter.sites if site.is_full]
    _refuse_full(full, dialect)
    return full_tensors(adapter, naming, None) if full else {}


def _whole_leaves(
    full: Sequence[Site], naming: Any, values: Mapping[tuple[str, str], Any]
) -> dict[tuple[str, ...], Any]:
    entries = full_entries(full, naming, {site.path: np.empty(site.shape, site.dtype) for site in full})
    stored = {f"{module}.{tensor}" if module else tensor: x for (module, tensor), x in values.items()}
    problems = []
    for entry in entries:
        for name in entry.names:
            shape = shape_dtype(stored[name])[0] if name in stored else "not there"
            if shape != entry.layout.torch_shape:
                problems.append(f"{name} {entry.layout.torch_shape}, which the plan trains in full, is {shape}")
    raise_together("the torch model does not fit the plan", problems)
    paths = {torch_path(site): site.path for site in full}
    return {
        paths[entry.leaf.path]: entry.layout.from_torch(
            [convert(stored[name], "numpy") for name in entry.names], ops_of("numpy")
        )
        for entry in entries
    }


def _refuse_full(full: Sequence[Site], dialect: str) -> None:
    if full and dialect in _PEFT:
        raise ValueError(
            f"`{full[0].name}` is trained in full, for which PEFT wraps the module: use `save_peft` and `load_peft`"
        )


def _only_torchtune(dialect: str | None) -> None:
    if dialect != "torchtune":
        raise ValueError(f"`decoder` has torchtune's names, but the dialect is {dialect!r}; leave it out")


def _moved(
    values: Mapping[tuple[str, str], Any], move: Callable[[str, str, Any], tuple[str, str, Any]]
) -> dict[tuple[str, str], Any]:
    moved = [move(module, part, value) for (module, part), value in values.items()]
    return {(module, part): value for module, part, value in moved}


def _to_jax(x: Any, dtype: Any, copy: bool, path: tuple[str, ...]) -> jax.Array:
    x = x if dtype is None else ops_of(kind_of(x)).cast(x, np.dtype(dtype))
    if problems := kept_by("jax", ".".join(path), shape_dtype(x)[1], "pass `dtype='float32'`"):
        raise ValueError(problems[0])
    out = convert(x, "jax")
    return jnp.array(out) if copy else out
