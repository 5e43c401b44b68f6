"""Flax nnx: a module around an unmodified base whose factors are `nnx.LoRAParam` variables."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lora_jax import functional, many, planning
from lora_jax.adapters import Adapter, as_adapter
from lora_jax.bank import AdapterStack
from lora_jax.config import LoRAConfig
from lora_jax.merging import merge as merge_params
from lora_jax.nnx_call import BASE_PARAMS, Call, Item, is_graph_node
from lora_jax.ops.choice import check_implementation
from lora_jax.planning import Plan

# Attributes of the wrapper itself; every other one is the base's.
OWN = frozenset({"base", "lora", "lora_plan", "lora_implementation", "lora_rngs", "deterministic"})


def adapt(
    model: nnx.Module,
    config: LoRAConfig,
    *args: Any,
    rngs: nnx.Rngs,
    method: str = "__call__",
    axis_roles: Mapping[str, str] | None = None,
    implementation: str | None = None,
    call: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> AdaptedModule:
    """Adapts an nnx module, unmodified: the same arrays, the same state.

    **Arguments:**

    - `model`: any nnx module; `args`, `kwargs`, `method`: an example call, to learn how each parameter is used.
      Nothing is computed and no state of the model advances.
    - `rngs`: its `"lora"` stream (or the default) draws the factors and, later, dropout masks.
    - `axis_roles`: see `lora_jax.plan`.
    - `implementation`: of the products; see `lora_jax.apply`.
    - `call`: keyword arguments of the example call that have a name of this function's, e.g. `{"rngs": ...}`.

    **Returns:** a module that is called like `model`. Its factors are `nnx.LoRAParam`s:
    `nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)`, `nnx.DiffState(0, nnx.LoRAParam)`. Dropout on the low-rank
    branch is on after `train()` (and at first), off after `eval()`.

    **Raises:** as `lora_jax.plan`; `ValueError` if the model holds `nnx.LoRAParam`s already.
    """
    if present := [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))]:
        names = ", ".join(f"`{'.'.join(map(str, path))}`" for path in present[:3])
        raise ValueError(
            f"the model already holds {len(present)} `nnx.LoRAParam`s ({names} ...), which an optimizer with "
            "`wrt=nnx.LoRAParam` would train too. Merge them first (`lora_jax.nnx.merge`), or adapt the plain model."
        )
    example = Call(model, (), method, args, {**kwargs, **(call or {})})
    plan = planning.plan(
        example.fn, example.params, example.state, example.inputs, config=config, axis_roles=axis_roles
    )
    adapter = plan.init(rngs.lora(), example.params)
    check_implementation(implementation)
    draws = nnx.Rngs(lora=rngs.lora()) if config.dropout > 0 else None
    return AdaptedModule(model, plan, adapter, draws, implementation)


class Static:
    """Keeps an object out of nnx's comparisons: two graph definitions agree if they hold the same one."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return type(self.value).__name__


class AdaptedModule(nnx.Module):
    """A base module and its factors.

    **Attributes:** `base`, the module as it was; `lora`, the factors (`nnx.LoRAParam`) nested by path. Every
    other attribute is the base's, for reading and for setting: plain values as they are, methods and submodules so
    that calling them runs adapted. (A function that the base stores as a value and that closes over the base
    runs unadapted: nothing tells it from any other.)
    """

    def __init__(
        self, base: nnx.Module, plan: Plan, adapter: Adapter, rngs: nnx.Rngs | None, implementation: str | None = None
    ):
        self.base = base
        self.lora = variables(adapter.to_dict())
        self.lora_plan = Static(plan)
        self.lora_implementation = implementation
        if rngs is not None:
            self.lora_rngs = rngs
            self.deterministic = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, (), "__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base")
        if base is None or name in OWN or name.startswith("_") or not hasattr(base, name):
            raise AttributeError(f"neither the adapted module nor its base has an attribute {name!r}")
        return _reach(self, base, (), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN or name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self.base, name, value)

    def _in_use(self) -> tuple[Plan, Adapter | None]:
        """What a call runs with; no adapter for the base as it is."""
        plan = plan_of(self)
        return plan, as_adapter(nnx.to_pure_dict(nnx.state(self.lora, nnx.LoRAParam)), plan.sites)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Used by `nnx.view`: `deterministic=True` turns dropout on the low-rank branch off."""
        if deterministic is not None and "lora_rngs" in self.__dict__:
            self.deterministic = deterministic


class _Part:
    """A submodule of an adapted module, reached by attribute or index; calls on it run adapted."""

    def __init__(self, owner: AdaptedModule, node: Any, path: tuple[Any, ...]):
        vars(self).update(_owner=owner, _node=node, _path=path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self._owner, self._path, "__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _reach(self._owner, self._node, self._path, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._node, name, value)

    def __getitem__(self, index: Any) -> Any:
        return _wrapped(self._owner, self._node[index], (*self._path, Item(index)))

    def __len__(self) -> int:
        return len(self._node)

    def __iter__(self) -> Any:
        return iter(self._node) if isinstance(self._node, Mapping) else (self[i] for i in range(len(self._node)))

    def __repr__(self) -> str:
        return f"adapted part {self._path} of {type(self._owner.base).__name__}"


def plan_of(model: AdaptedModule) -> Plan:
    """The plan an adapted module was made from."""
    return model.lora_plan.value


def adapter_of(model: AdaptedModule) -> Adapter:
    """The factors as an `Adapter`, ready for `lora_torch.save_peft`, `lora_jax.checkpoint` or `lora_jax.merge`."""
    adapter = model._in_use()[1]
    if adapter is None:
        raise ValueError("no adapter is in use: activate one, or unmerge it.")
    return adapter


def set_adapter(model: AdaptedModule, adapter: Any) -> None:
    """Puts other factors for the same parameters (an `Adapter` or a nested dict) into the module, in place.

    An `Adapter` brings its own rank and alpha.

    **Raises:** `ValueError` naming every leaf that does not fit.
    """
    checked = as_adapter(adapter, plan_of(model).sites)
    new, own = ({path for site in sites for path in site.leaves} for sites in (checked.sites, plan_of(model).sites))
    if new != own:
        other = "/".join(min(new ^ own))
        raise ValueError(
            f"the adapter and the module differ in {other} (DoRA, a bias on B, trained rows): the module's variables "
            "are those of its configuration. Adapt the base again, with the configuration of this adapter."
        )
    state = nnx.state(model.lora, nnx.LoRAParam)
    nnx.replace_by_pure_dict(state, checked.to_dict())
    nnx.update(model.lora, state)
    if checked.sites != plan_of(model).sites:
        model.lora_plan = Static(dataclasses.replace(plan_of(model), sites=checked.sites))


def apply_many(
    model: AdaptedModule,
    stack: AdapterStack,
    ids: Any,
    *args: Any,
    method: str = "__call__",
    key: jax.Array | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    selection: str | None = None,
    **kwargs: Any,
) -> Any:
    """The base of `model` with the adapters of a bank in the place of its own, as `lora_jax.apply_many` does it.

    The base's state is shared by all parts of the batch. What a part changes in it has to be the same for all (the
    counter of a random stream); statistics over the batch and caches are an error.

    **Raises:** as `lora_jax.apply_many`.
    """
    call = Call(model.base, (), method, args, kwargs)

    def is_leaf(x: Any) -> bool:
        return x is None or is_graph_node(x)

    axes = jax.tree.leaves(jax.tree.broadcast((in_axes, 0), (args, kwargs), is_leaf=is_leaf), is_leaf=is_leaf)
    run = many.apply_many(call.fn, plan_of(model), selection=selection)
    out, changes = run(
        call.params, stack, ids, call.state, call.inputs, key=key, in_axes=(None, axes), out_axes=(out_axes, None)
    )
    call.put_back(changes)
    return out


def merge(model: AdaptedModule) -> nnx.Module:
    """A copy of the base with the factors folded in (see `lora_jax.merge`); the adapted module stays as it is."""
    graphdef, params, rest = nnx.split(model.base, BASE_PARAMS, ...)
    return nnx.clone(nnx.merge(graphdef, merge_params(params, adapter_of(model)), rest))


def _reach(owner: AdaptedModule, node: Any, path: tuple[Any, ...], name: str) -> Any:
    value = getattr(node, name)
    by_class = inspect.getattr_static(type(node), name, None)
    if name in vars(node) or by_class is None or not callable(value):
        return _wrapped(owner, value, (*path, name))
    if isinstance(by_class, staticmethod | classmethod | property):
        return value
    if by_class is inspect.getattr_static(nnx.Module, name, None):
        return value  # train(), eval(), set_attributes() ... are about the module itself

    def method(*args: Any, **kwargs: Any) -> Any:
        return _run(owner, path, name, args, kwargs)

    return method


def _wrapped(owner: AdaptedModule, value: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(value, nnx.Module) and not isinstance(value, nnx.Rngs):
        return _Part(owner, value, path)
    holds_modules = isinstance(value, list | tuple) and any(isinstance(v, nnx.Module) for v in value)
    return _Part(owner, value, path) if holds_modules else value


def _run(model: AdaptedModule, path: tuple[Any, ...], method: str, args: Any, kwargs: Any) -> Any:
    plan, adapter = model._in_use()
    call = Call(model.base, path, method, args, kwargs)
    if adapter is None:
        out, changes = call.fn(call.params, call.state, call.inputs)
    else:
        key = model.lora_rngs.lora() if plan.config.dropout > 0 and not model.deterministic else None
        adapted = functional.apply(call.fn, plan, implementation=model.lora_implementation)
        out, changes = adapted(call.params, adapter, call.state, call.inputs, key=key)
    call.put_back(changes)
    return out


def variables(tree: Mapping[str, Any], kind: type[nnx.Variable] = nnx.LoRAParam) -> nnx.Dict:
    """A nested mapping of arrays as nnx variables of one type."""
    return nnx.Dict({k: variables(v, kind) if isinstance(v, Mapping) else kind(v) for k, v in tree.items()})
