"""Flax linen: an adapted model that is applied like a module, with the adapter as the `"lora"` collection."""

from __future__ import annotations

import inspect
import operator
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
from flax.core import DenyList
from flax.core.scope import in_filter, union_filters

from lora_jax import functional, many, planning
from lora_jax.adapters import Adapter
from lora_jax.config import LoRAConfig
from lora_jax.ops.choice import check_implementation
from lora_jax.planning import Plan

LORA = "lora"


def adapt(
    model: nn.Module,
    params: Any,
    config: LoRAConfig,
    *args: Any,
    key: jax.Array,
    variables: Mapping[str, Any] | None = None,
    rngs: Any = None,
    method: Any = None,
    mutable: Any = False,
    axis_roles: Mapping[str, str] | None = None,
    implementation: str | None = None,
    call: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[AdaptedModule, Adapter]:
    """Adapts a linen module, unmodified.

    **Arguments:**

    - `model`, `params`: any linen module and its `"params"` collection, which stays as it is.
    - `args`, `kwargs`, `method`: an example call, to learn how each parameter is used. Nothing is computed.
    - `key`: PRNG key of the new factors.
    - `variables`: the other collections the call needs (`"batch_stats"`, `"cache"` ...).
    - `rngs`, `mutable`: as in `model.apply`, where the example call needs them.
    - `axis_roles`: see `lora_jax.plan`.
    - `implementation`: of the products; see `lora_jax.apply`.
    - `call`: keyword arguments of the example call that have a name of this function's, e.g. `{"key": ...}`.

    **Returns:** `(adapted, adapter)`; apply as
    `adapted.apply({"params": params, "lora": adapter}, *args, rngs={"lora": key})`. Dropout on the low-rank
    branch is on where the `"lora"` rng is given.

    **Raises:** as `lora_jax.plan`.
    """
    inputs = (_others(variables or {}), _streams(rngs)[0], args, {**kwargs, **(call or {})})
    fn = _caller(model, method, mutable)
    plan = planning.plan(fn, params, *inputs, config=config, axis_roles=axis_roles)
    check_implementation(implementation)
    return AdaptedModule(model, plan, implementation), plan.init(key, params)


@dataclass(frozen=True, eq=False)
class AdaptedModule:
    """A linen module whose planned parameters are adapted; holds no arrays.

    **Fields:** `module`, the base as it was; `plan`, what is adapted; `implementation`, of its products. Other
    attributes are the base's.
    """

    module: nn.Module
    plan: Plan
    implementation: str | None = None

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """`module.apply`, with `variables["lora"]` folded into the parameters as they are used.

        With `mutable`, returns `(output, updated collections)` as linen does; `"params"` and `"lora"` are
        trained, not mutated, so they come back as they were (and naming them in `mutable` is an error).

        **Raises:** `ValueError` if `"params"` or `"lora"` is missing, mutable, or does not fit the plan.
        """
        for name in ("params", LORA):
            if name not in variables:
                raise ValueError(
                    f"`variables` has no `{name}` collection (found {sorted(variables)}); call "
                    'apply({"params": params, "lora": adapter, ...}, ...).'
                )
        fn = _caller(self.module, method, mutable, capture_intermediates)
        streams, key = _streams(rngs)
        adapted = functional.apply(fn, self.plan, implementation=self.implementation)
        out = adapted(variables["params"], variables[LORA], _others(variables), streams, args, kwargs, key=key)
        if mutable is True:
            y, updated = out
            return y, {**updated, "params": variables["params"], LORA: variables[LORA]}
        return out

    __call__ = apply

    def apply_many(
        self,
        variables: Mapping[str, Any],
        ids: Any,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        in_axes: Any = 0,
        out_axes: Any = 0,
        collection_axes: Mapping[str, int | None] | None = None,
        selection: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """`apply` with several adapters: `variables["lora"]` is the `stack` of a `lora_jax.AdapterBank`.

        Each part of the batch is computed as if alone with the adapter of its id; see `lora_jax.apply_many`, whose
        `in_axes` is for `args`.

        **Arguments:** `collection_axes`: the axis of the batch in the other collections that have one, e.g.
        `{"cache": 0}`. Those not named are shared, and a part cannot change them (batch statistics); scalars, such as
        a cache's index, always are. `rngs`: each part uses the model's own streams as they are.

        **Raises:** as `lora_jax.apply_many`.
        """
        fn = _caller(self.module, method, mutable)
        streams, key = _streams(rngs)
        axes = dict(collection_axes or {})
        others = _others(variables)
        if unknown := sorted(axes.keys() - others.keys()):
            raise ValueError(f"`collection_axes` names {unknown}, and `variables` has {sorted(variables)}.")

        def with_updates(shapes: Any) -> Any:
            def place(path: Any, leaf: Any) -> int | None:
                return axes.get(path[0].key) if leaf.ndim else None

            return out_axes, jax.tree.map_with_path(place, shapes[1])

        return many.apply_many(fn, self.plan, selection=selection)(
            variables["params"], variables[LORA], ids, others, streams, args, kwargs, key=key,
            in_axes=({name: axes.get(name) for name in others}, None, in_axes, 0),
            out_axes=out_axes if mutable is False else with_updates,
        )  # fmt: skip

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Fresh variables of the base, and a fresh adapter in `"lora"` (from the `"lora"` rng, or the first)."""
        streams = dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}
        fallback = jax.random.fold_in(_typed(next(iter(streams.values()))), zlib.crc32(LORA.encode()))
        key = streams.pop(LORA, fallback)
        variables = dict(self.module.init(streams, *args, **kwargs))
        functional.check_params(self.plan.sites, _shapes(variables.get("params", {})))
        return {**variables, LORA: self.plan.init(key, variables["params"])}

    def bind(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, mutable: Any = False) -> Bound:
        """The model with its variables: `bound(x)`, `bound.encode(x)`, `bound.encoder(x)`.

        With `mutable`, each call's updates are kept in `bound.variables`.
        """
        if args:
            raise TypeError("`bind` takes the variables; pass the inputs to the bound model's methods.")
        return Bound(self, dict(variables), rngs, mutable)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("module", "plan", "implementation"):
            raise AttributeError(name)
        value = getattr(self.module, name)
        if callable(value) and inspect.getattr_static(nn.Module, name, None) is not None:
            raise AttributeError(
                f"`{name}` would run the base without its adapter; for that, write `adapted.module.{name}`. Adapted "
                "are `apply`, `apply_many`, `init` and `bind`."
            )
        return value


class Bound:
    """An adapted module together with its variables."""

    def __init__(self, adapted: AdaptedModule, variables: dict[str, Any], rngs: Any, mutable: Any, path=()):
        self._adapted, self._rngs, self._mutable, self._path = adapted, rngs, mutable, path
        self.variables = variables

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def method(module: nn.Module, *inner_args: Any, **inner_kwargs: Any) -> Any:
            return self._walk(module)(*inner_args, **inner_kwargs)

        out = self._adapted.apply(
            self.variables, *args, rngs=self._rngs, method=method, mutable=self._mutable, **kwargs
        )
        if self._mutable is False:
            return out
        y, updated = out
        self.variables.update(updated)  # shared with every part of this bound model
        return y

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._step((getattr, name))

    def __getitem__(self, index: Any) -> Any:
        return self._step((operator.getitem, index))

    def _step(self, step: tuple[Any, Any]) -> Any:
        """A plain value as it is; a method or submodule as another `Bound`, so that calling it runs adapted."""
        deeper = Bound(self._adapted, self.variables, self._rngs, self._mutable, (*self._path, step))
        collections = {name: value for name, value in self.variables.items() if name != LORA}
        value = deeper._walk(self._adapted.module.bind(collections))
        parts = jax.tree.leaves(value, is_leaf=_is_module)
        return deeper if callable(value) or any(map(_is_module, parts)) else value

    def _walk(self, module: Any) -> Any:
        for get, name in self._path:
            module = get(module, name)
        return module


def _is_module(x: Any) -> bool:
    return isinstance(x, nn.Module)


def _caller(model: nn.Module, method: Any, mutable: Any, capture: Any = False) -> Callable[..., Any]:
    mutable = _without_trained(mutable)

    def fn(params: Any, others: Any, rngs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        variables = {"params": params, **others}
        extra = {"capture_intermediates": capture} if capture else {}
        return model.apply(variables, *args, rngs=rngs, method=method, mutable=mutable, **extra, **kwargs)

    return fn


def _without_trained(mutable: Any) -> Any:
    """The filter `mutable` without `"params"` and `"lora"`; raises where it names them itself."""
    if mutable is True:
        return DenyList(["params", LORA])
    if isinstance(mutable, DenyList):
        return DenyList(union_filters(mutable.deny, ["params", LORA]))
    if frozen := [name for name in ("params", LORA) if mutable is not False and in_filter(mutable, name)]:
        raise ValueError(f"{frozen} cannot be mutable: an adapted model trains them, it does not mutate them.")
    return mutable


def _streams(rngs: Any) -> tuple[Any, jax.Array | None]:
    """The model's own rngs, and the key of the `"lora"` stream."""
    if rngs is None or not isinstance(rngs, Mapping):
        return rngs, None
    own = {name: key for name, key in rngs.items() if name != LORA}
    key = rngs.get(LORA)
    return own or None, None if key is None else _typed(key)


def _typed(key: Any) -> jax.Array:
    """A typed key from a typed or a raw one."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _others(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if name not in ("params", LORA)}


def _shapes(params: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    from lora_jax.tracing import flatten_params

    paths, leaves, _ = flatten_params(params)
    return {path: tuple(leaf.shape) for path, leaf in zip(paths, leaves, strict=True)}


def _restore(target: Adapter, state: Mapping[str, Any]) -> Adapter:
    from lora_jax.adapters import as_adapter

    return as_adapter(flax.serialization.from_state_dict(target.to_dict(), dict(state)), target.sites)


# So that `flax.serialization.to_bytes`, `TrainState` checkpoints and msgpack files carry adapters.
flax.serialization.register_serialization_state(Adapter, Adapter.to_dict, _restore)
