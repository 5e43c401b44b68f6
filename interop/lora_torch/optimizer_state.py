"""Moments of an optimizer that trains an adapter, between optax and torch.optim, so that a run can change worlds.

    optax                                torch
    adam, adamw      mu, nu, count       Adam, AdamW    exp_avg, exp_avg_sq, step
    sgd(momentum=)   trace               SGD(momentum=) momentum_buffer
    sgd              nothing             SGD            nothing

Moments have the shapes of the factors and travel by the same names and layouts. Both libraries compute the same update
from them, up to rounding, if learning rate, betas, eps and weight decay are the same: **their defaults differ** (weight
decay is 1e-4 in `optax.adamw`, 1e-2 in `torch.optim.AdamW`), and no state tells those of optax.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._compat import path_names
from lora_jax.adapters import Adapter, as_adapter, expected_leaves
from lora_jax.planning import Plan
from lora_jax.sites import Site

from .exchange import adapter_from_torch, adapter_to_torch, linear_places
from .live_models import dialect_of, raise_together
from .naming import nearest
from .peft_names import Names
from .torchtune_names import TuneDecoder

_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_MOMENTUM = {"trace": "momentum_buffer"}
Path = tuple[str, ...]


def optimizer_to_torch(
    state: Any,
    plan_or_sites: Plan | Sequence[Site],
    model: Any,
    optimizer: Any,
    *,
    names: Names = None,
    adapter_name: str = "default",
    decoder: TuneDecoder | None = None,
) -> dict[str, Any]:
    """An optax state as a state dict for `optimizer.load_state_dict`.

    **Arguments:**

    - `state`: of `optax.adam`, `adamw` or `sgd`, also inside `chain` or `inject_hyperparams`, or the `opt_state` of an
        `nnx.Optimizer`.
    - `model`, `optimizer`: the torch model, and a torch optimizer of exactly its adapter's parameters. Neither is
        changed; the parameter groups, learning rate included, are `optimizer`'s.
    - `names`, `adapter_name`, `decoder`: as in `adapter_to_torch`.

    **Raises:** `ValueError` for another optimizer on either side, for an optimizer that holds other parameters than the
    adapter's, and for a fused kernel, whose one A is several in torch.
    """
    import torch

    sites, slots = _sites(plan_or_sites, names), _slots_of(optimizer)
    moments, counts = _read(state, sites)
    _same_kind(moments, slots, optimizer)
    spelling: dict[str, Any] = {"names": names, "adapter_name": adapter_name, "decoder": decoder}
    dialect = dialect_of(model, adapter_name)
    found = {
        slots[slot]: adapter_to_torch(_adapter(leaves, sites), dialect, copy=True, **spelling)
        for slot, leaves in moments.items()
    }
    parameters = _parameters(model, optimizer, sites, dialect, spelling)
    out: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(parameters):
        if found:
            out[index] = {slot: tensors[name] for slot, tensors in found.items()}
        if "exp_avg" in found:
            out[index]["step"] = torch.tensor(float(_one(counts, "the optax state counts")))
    return {"state": out, "param_groups": optimizer.state_dict()["param_groups"]}


def optimizer_from_torch(
    optimizer: Any,
    model: Any,
    plan_or_sites: Plan | Sequence[Site],
    state: Any,
    *,
    names: Names = None,
    adapter_name: str = "default",
    decoder: TuneDecoder | None = None,
    step: int | None = None,
) -> Any:
    """The optax state that continues what a torch optimizer began.

    **Arguments:**

    - `state`: what `tx.init(adapter)` returns, for its structure and dtypes. Its moments and every count in it, also
        those of schedules, are replaced.
    - `step`: of SGD, which counts none in torch, for the schedules in `state`.
    - the others: as in `optimizer_to_torch`.

    **Returns:** a new state of exactly the structure of `state`.

    **Raises:** as `optimizer_to_torch`; `ValueError` if parameters took unequal numbers of steps, or if a schedule
    counts and nothing says where it is.
    """
    sites, slots = _sites(plan_or_sites, names), _slots_of(optimizer)
    own, counts = _read(state, sites)
    _same_kind(own, slots, optimizer)
    spelling: dict[str, Any] = {"names": names, "adapter_name": adapter_name, "decoder": decoder}
    dialect = dialect_of(model, adapter_name)
    parameters = _parameters(model, optimizer, sites, dialect, spelling)
    stored = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    idle = [name for name, each in stored.items() if any(each.get(slot) is None for slot in slots.values())]
    if idle and len(idle) < len(stored):
        raise ValueError(f"{', '.join(idle[:3])} took no step in torch, other parameters did: step them all, or none")
    if idle:
        found: dict[str, Adapter] = {slot: _zeros(sites) for slot in slots}
    else:
        found = {
            slot: adapter_from_torch({name: each[kept] for name, each in stored.items()}, sites, dialect, **spelling)
            for slot, kept in slots.items()
        }
    if "mu" in slots:
        step = 0 if idle else int(_one({float(each["step"]) for each in stored.values()}, "the torch optimizer counts"))
    if step is None and counts:
        raise ValueError("a schedule in the optax state counts steps, and SGD counts none in torch: pass `step=`")
    known = expected_leaves(sites)
    values = {(slot, path): found[slot].leaf(path) for slot in slots for path in known}
    leaves, rebuild = jax.tree_util.tree_flatten_with_path(state)
    places = [_place(path_names(keys), known) for keys, _ in leaves]
    new = [
        leaf if place is None else jnp.asarray(step if place == "count" else values[place], leaf.dtype)  # type: ignore[index]
        for place, (_, leaf) in zip(places, leaves, strict=True)
    ]
    return rebuild.unflatten(new)


def _sites(plan_or_sites: Plan | Sequence[Site], names: Names) -> tuple[Site, ...]:
    sites = plan_or_sites.sites if isinstance(plan_or_sites, Plan) else tuple(plan_or_sites)
    raise_together(
        "moments cannot be exchanged where torch has several lora_A for one",
        [f"`{p.site.name}` is {', '.join(p.names)}" for p in linear_places(sites, names) if not p.is_plain],
    )
    return sites


def _slots_of(optimizer: Any) -> dict[str, str]:
    """optax's names of the moments that a torch optimizer keeps, and torch's."""
    import torch

    groups = optimizer.param_groups
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        if any(group["amsgrad"] for group in groups):
            raise ValueError("`amsgrad=True` keeps a third moment, which `optax.adamw` lacks; set it to False")
        return _ADAM
    if isinstance(optimizer, torch.optim.SGD):
        if any(group["dampening"] for group in groups):
            raise ValueError("`dampening` has no counterpart in `optax.sgd`; set it to 0")
        momentum = {bool(group["momentum"]) for group in groups}
        if len(momentum) > 1:
            raise ValueError("some parameter groups of the torch optimizer have momentum, others none; use one kind")
        return _MOMENTUM if momentum == {True} else {}
    raise ValueError(f"{type(optimizer).__name__} is none of torch's Adam, AdamW and SGD, which are exchanged here")


def _same_kind(moments: Mapping[str, Any], slots: Mapping[str, str], optimizer: Any) -> None:
    if set(moments) != set(slots):
        raise ValueError(
            f"the optax state holds {sorted(moments) or 'no moments'}, torch's {type(optimizer).__name__} "
            f"{sorted(slots.values()) or 'none'}: use the same optimizer, with momentum on both sides or on neither"
        )


def _read(state: Any, sites: tuple[Site, ...]) -> tuple[dict[str, dict[Path, Any]], set[float]]:
    """The moments of an optax state, `{slot: {leaf path: array}}`, and the counts in it."""
    moments: dict[str, dict[Path, Any]] = {}
    counts: set[float] = set()
    known = expected_leaves(sites)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = path_names(keys)
        place = _place(names, known)
        if place == "count":
            counts.add(float(leaf))
        elif place is not None:
            slot, path = place
            moments.setdefault(slot, {})[path] = leaf
        elif np.ndim(leaf):  # a scalar is a hyperparameter
            raise ValueError(f"`{'.'.join(names)}` of the optax state is no moment of adamw or sgd of this adapter")
    return moments, counts


def _place(names: Path, known: Collection[Path]) -> Any:
    """`(slot, leaf path)` of a leaf of an optax state, `"count"`, or None."""
    if names[-1:] == ("count",):
        return "count"
    for n, name in enumerate(names):
        if name in (*_ADAM, *_MOMENTUM):
            path = names[n + 1 :]
            # An nnx optimizer's state is that of the whole module, whose factors lie below `lora`.
            return next(((name, each) for each in (path, path[1:]) if each in known), None)
    return None


def _parameters(
    model: Any, optimizer: Any, sites: Sequence[Site], dialect: Any, spelling: Mapping[str, Any]
) -> dict[str, Any]:
    """The optimizer's parameters by name, in its order: exactly those of the adapter."""
    wanted = adapter_to_torch(_zeros(sites), dialect, kind="numpy", **spelling)
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    problems = [
        f"it holds a parameter of shape {tuple(p.shape)} that the model does not have"
        for p in held
        if id(p) not in by_id
    ]
    out = {by_id[id(p)]: p for p in held if id(p) in by_id}
    problems += [
        f"it holds {name}, which is not the adapter's{nearest(name, wanted)}" for name in out if name not in wanted
    ]
    problems += [f"it lacks {name}{nearest(name, out)}" for name in wanted if name not in out]
    raise_together("the torch optimizer must hold the adapter's parameters and no others", problems)
    return out


def _adapter(leaves: Mapping[Path, Any], sites: tuple[Site, ...]) -> Adapter:
    return as_adapter(Adapter.from_leaves(leaves, sites), sites)


def _zeros(sites: Sequence[Site]) -> Adapter:
    shapes = expected_leaves(tuple(sites))
    return Adapter.from_leaves({path: np.zeros(shape, np.float32) for path, shape in shapes.items()}, tuple(sites))


def _one(counts: set[float], what: str) -> float:
    if len(counts) != 1:
        raise ValueError(f"{what} {sorted(counts)} steps; one number is needed")
    return next(iter(counts))
