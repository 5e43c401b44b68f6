"""Flax nnx: a module around an unmodified base whose factors are `nnx.LoRAParam` variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from lora_jax import functional, planning
from lora_jax.adapters import Adapter, as_adapter
from lora_jax.config import LoRAConfig
from lora_jax.merging import merge as merge_params
from lora_jax.planning import Plan


def adapt(
    model: nnx.Module,
    config: LoRAConfig,
    *args: Any,
    rngs: nnx.Rngs,
    method: str = "__call__",
    axis_roles: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> AdaptedModule:
    """Adapts an nnx module, unmodified: the same arrays, the same state.

    **Arguments:**

    - `model`: any nnx module; `args`, `kwargs`, `method`: an example call, to learn how each parameter is used.
      Nothing is computed and no state of the model advances.
    - `rngs`: its `"lora"` stream (or the default) draws the factors and, later, dropout masks.
    - `axis_roles`: see `lora_jax.plan`.

    **Returns:** a module that is called like `model`. Its factors are `nnx.LoRAParam`s:
    `nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)`, `nnx.DiffState(0, nnx.LoRAParam)`. Dropout on the low-rank
    branch is on after `train()` (and at first), off after `eval()`.

    **Raises:** as `lora_jax.plan`.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    fn = _pure(graphdef, (), method)
    plan = planning.plan(fn, params, rest, *args, config=config, axis_roles=axis_roles, **kwargs)
    adapter = plan.init(rngs.lora(), params)
    return AdaptedModule(model, plan, adapter, nnx.Rngs(lora=rngs.lora()) if config.dropout > 0 else None)


class _Static:
    """Keeps an object out of nnx's comparisons: two graph definitions agree if they hold the same one."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return type(self.value).__name__


class AdaptedModule(nnx.Module):
    """A base module and its factors.

    **Attributes:** `base`, the module as it was; `lora`, the factors (`nnx.LoRAParam`) nested by path. Every
    other attribute is the base's: plain values as they are, methods and submodules so that calling them runs
    adapted.
    """

    def __init__(self, base: nnx.Module, plan: Plan, adapter: Adapter, rngs: nnx.Rngs | None):
        self.base = base
        self.lora = _variables(adapter.to_dict())
        self.lora_plan = _Static(plan)
        if rngs is not None:
            self.lora_rngs = rngs
            self.deterministic = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, (), "__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base")
        if base is None or name.startswith("__") or not hasattr(base, name):
            raise AttributeError(f"neither the adapted module nor its base has an attribute {name!r}")
        return _reach(self, base, (), name)


class _Part:
    """A submodule of an adapted module, reached by attribute or index; calls on it run adapted."""

    def __init__(self, owner: AdaptedModule, node: Any, path: tuple[Any, ...]):
        self._owner, self._node, self._path = owner, node, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self._owner, self._path, "__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _reach(self._owner, self._node, self._path, name)

    def __getitem__(self, index: Any) -> Any:
        return _wrapped(self._owner, self._node[index], (*self._path, _Item(index)))

    def __len__(self) -> int:
        return len(self._node)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self._node)))

    def __repr__(self) -> str:
        return f"adapted part {self._path} of {type(self._owner.base).__name__}"


class _Item:
    """A step of a path by index rather than by attribute."""

    def __init__(self, index: Any):
        self.index = index

    def __repr__(self) -> str:
        return f"[{self.index!r}]"


def plan_of(model: AdaptedModule) -> Plan:
    """The plan an adapted module was made from."""
    return model.lora_plan.value


def adapter_of(model: AdaptedModule) -> Adapter:
    """The factors as an `Adapter`, ready for `lora_torch.save_peft`, `lora_jax.checkpoint` or `lora_jax.merge`."""
    leaves = nnx.to_pure_dict(nnx.state(model.lora, nnx.LoRAParam))
    return as_adapter(leaves, plan_of(model).sites)


def set_adapter(model: AdaptedModule, adapter: Any) -> None:
    """Puts other factors of the same shapes (an `Adapter` or nested dict) into the module, in place."""
    checked = as_adapter(adapter, plan_of(model).sites)
    state = nnx.state(model.lora, nnx.LoRAParam)
    nnx.replace_by_pure_dict(state, checked.to_dict())
    nnx.update(model.lora, state)


def merge(model: AdaptedModule) -> nnx.Module:
    """A copy of the base with the factors folded in (see `lora_jax.merge`); the adapted module stays as it is."""
    graphdef, params, rest = nnx.split(model.base, nnx.Param, ...)
    return nnx.merge(graphdef, merge_params(params, adapter_of(model)), rest)


def _reach(owner: AdaptedModule, node: Any, path: tuple[Any, ...], name: str) -> Any:
    value = getattr(node, name)
    if getattr(value, "__self__", None) is node and callable(value):

        def method(*args: Any, **kwargs: Any) -> Any:
            return _run(owner, path, name, args, kwargs)

        return method
    return _wrapped(owner, value, (*path, name))


def _wrapped(owner: AdaptedModule, value: Any, path: tuple[Any, ...]) -> Any:
    is_part = isinstance(value, nnx.Module | list | tuple) and not isinstance(value, nnx.Rngs)
    holds_modules = isinstance(value, nnx.Module) or any(isinstance(v, nnx.Module) for v in value) if is_part else False
    return _Part(owner, value, path) if holds_modules else value


def _run(model: AdaptedModule, path: tuple[Any, ...], method: str, args: Any, kwargs: Any) -> Any:
    graphdef, params, rest = nnx.split(model.base, nnx.Param, ...)
    key = None
    if "lora_rngs" in model.__dict__ and not model.deterministic:
        key = model.lora_rngs.lora()
    call = functional.apply(_pure(graphdef, path, method), plan_of(model))
    out, state = call(params, adapter_of(model), rest, *args, key=key, **kwargs)
    nnx.update(model.base, state)
    return out


def _pure(graphdef: Any, path: tuple[Any, ...], method: str) -> Callable[..., Any]:
    """A call of the base as a function of its parameters and its other state, which it returns updated."""

    def fn(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        node: Any = model
        for step in path:
            node = node[step.index] if isinstance(step, _Item) else getattr(node, step)
        out = node(*args, **kwargs) if method == "__call__" else getattr(node, method)(*args, **kwargs)
        return out, nnx.split(model, nnx.Param, ...)[2]

    return fn


def _variables(tree: Mapping[str, Any]) -> nnx.Dict:
    return nnx.Dict({k: _variables(v) if isinstance(v, Mapping) else nnx.LoRAParam(v) for k, v in tree.items()})
