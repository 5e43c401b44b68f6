"""What adapts a model and how much of it trains, in PEFT's words: for people who look for its reports."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.adapters import Adapter, expected_leaves
from lora_jax.sites import Site

Adapters = Adapter | Mapping[str, Adapter]


@dataclass(frozen=True)
class LayerStatus:
    """One adapted parameter, with the fields of PEFT's `get_layer_status`, and `ranks` and `scales` by adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    requires_grad: dict[str, bool]
    available_adapters: tuple[str, ...]
    devices: dict[str, tuple[str, ...]]
    ranks: dict[str, int]
    scales: dict[str, float]


@dataclass(frozen=True)
class ModelStatus:
    """All of them, with the fields of PEFT's `get_model_status`."""

    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    requires_grad: dict[str, bool]
    available_adapters: tuple[str, ...]
    devices: dict[str, tuple[str, ...]]


def layer_status(
    adapters: Adapters,
    *,
    active: Sequence[str] | None = None,
    merged: Sequence[str] = (),
    frozen: Collection[str] = (),
    enabled: bool = True,
) -> list[LayerStatus]:
    """One row for each parameter that any of the adapters adapts.

    An adapter is a value and knows nothing of how it is used, so that is said here: `active`, the names of those in
    use (all of them if None); `merged`, folded into the parameters already; `frozen`, not trained; `enabled`, whether
    any is in use at all. A bare `Adapter` is called "default".

    **Raises:** `ValueError` for a name that is none of the adapters'.
    """
    named, active = _checked(adapters, active, merged, frozen)
    owners: dict[tuple[str, ...], dict[str, Site]] = {}
    for name, adapter in named.items():
        for site in adapter.sites:
            owners.setdefault(site.path, {})[name] = site
    return [
        LayerStatus(
            name=next(iter(sites.values())).name,
            module_type=f"lora.{next(iter(sites.values())).op}",
            enabled=enabled,
            active_adapters=tuple(active),
            merged_adapters=tuple(name for name in merged if name in sites),
            requires_grad={name: name in active and name not in frozen for name in sites},
            available_adapters=tuple(sorted(sites)),
            devices={name: _devices(named[name], (site,)) for name, site in sites.items()},
            ranks={name: site.rank for name, site in sites.items()},
            scales={name: site.scale for name, site in sites.items()},
        )
        for sites in owners.values()
    ]


def model_status(
    params: Any,
    adapters: Adapters,
    *,
    active: Sequence[str] | None = None,
    merged: Sequence[str] = (),
    frozen: Collection[str] = (),
    enabled: bool = True,
) -> ModelStatus:
    """The totals of `layer_status` for a model with these base parameters."""
    named, active = _checked(adapters, active, merged, frozen)
    trained = [name for name in active if name not in frozen]
    trainable, total = parameter_counts(params, named, trained)
    return ModelStatus(
        adapter_model_type="LoraModel",
        peft_types=dict.fromkeys(named, "LORA"),
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len({site.path for adapter in named.values() for site in adapter.sites}),
        enabled=enabled,
        active_adapters=tuple(active),
        merged_adapters=tuple(merged),
        requires_grad={name: name in trained for name in named},
        available_adapters=tuple(sorted(named)),
        devices={name: _devices(adapter, adapter.sites) for name, adapter in named.items()},
    )


def parameter_counts(params: Any, adapters: Adapters, trained: Collection[str] | None = None) -> tuple[int, int]:
    """`(trainable, all)`. "all" counts the base and every adapter, with its copies of `modules_to_save`.

    `trained`: the names of the adapters that train; all of them if None.
    """
    named, _ = _checked(adapters, None, (), trained or ())
    base = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    counts = {name: adapter.count() for name, adapter in named.items()}
    trainable = sum(count for name, count in counts.items() if trained is None or name in trained)
    return trainable, base + sum(counts.values())


def trainable_parameters(trainable: int, total: int) -> str:
    """PEFT's line: `trainable params: 896 || all params: 20,768 || trainable%: 4.3143`."""
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


def print_trainable_parameters(params: Any, adapters: Adapters, trained: Collection[str] | None = None) -> None:
    """Prints what PEFT's `print_trainable_parameters` prints; see `parameter_counts`."""
    print(trainable_parameters(*parameter_counts(params, adapters, trained)))


def _checked(
    adapters: Adapters, active: Sequence[str] | None, merged: Collection[str], frozen: Collection[str]
) -> tuple[dict[str, Adapter], tuple[str, ...]]:
    # An `Adapter` is a mapping itself.
    named = {"default": adapters} if isinstance(adapters, Adapter) else dict(adapters)
    active = tuple(named) if active is None else tuple(active)
    if unknown := sorted({*active, *merged, *frozen} - named.keys()):
        raise ValueError(
            f"there is no adapter {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, named))}."
        )
    return named, active


def _devices(adapter: Adapter, sites: Sequence[Site]) -> tuple[str, ...]:
    leaves = [adapter.leaf(path) for path in expected_leaves(tuple(sites))]
    found = {device.platform for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
    return tuple(sorted(found)) or ("cpu",)
