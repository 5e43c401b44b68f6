"""Flax linen: an adapted model that is applied like a module, with the adapter as the `"lora"` collection."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
from flax.core import DenyList

from lora_jax import functional, planning
from lora_jax.adapters import Adapter
from lora_jax.config import LoRAConfig
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

    **Returns:** `(adapted, adapter)`; apply as
    `adapted.apply({"params": params, "lora": adapter}, *args, rngs={"lora": key})`. Dropout on the low-rank
    branch is on where the `"lora"` rng is given.

    **Raises:** as `lora_jax.plan`.
    """
    fn = _caller(model, method, mutable)
    others = _others(variables or {})
    plan = planning.plan(fn, params, others, _streams(rngs)[0], *args, config=config, axis_roles=axis_roles, **kwargs)
    return AdaptedModule(model, plan), plan.init(key, params)


@dataclass(frozen=True, eq=False)
class AdaptedModule:
    """A linen module whose planned parameters are adapted; holds no arrays.

    **Fields:** `module`, the base as it was; `plan`, what is adapted. Other attributes are the base's.
    """

    module: nn.Module
    plan: Plan

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
        call = functional.apply(fn, self.plan)
        out = call(variables["params"], variables[LORA], _others(variables), streams, *args, key=key, **kwargs)
        if mutable is True:
            y, updated = out
            return y, {**updated, "params": variables["params"], LORA: variables[LORA]}
        return out

    __call__ = apply

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
        if name.startswith("__") or name in ("module", "plan"):
            raise AttributeError(name)
        return getattr(self.module, name)


class Bound:
    """An adapted module together with its variables."""

    def __init__(self, adapted: AdaptedModule, variables: dict[str, Any], rngs: Any, mutable: Any, path=()):
        self._adapted, self._rngs, self._mutable, self._path = adapted, rngs, mutable, path
        self.variables = variables

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def method(module: nn.Module, *inner_args: Any, **inner_kwargs: Any) -> Any:
            target: Any = module
            for name in self._path:
                target = getattr(target, name)
            return target(*inner_args, **inner_kwargs)

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
        if not self._path:
            value = getattr(self._adapted.module, name, None)
            if value is not None and not callable(value):
                return value
        return Bound(self._adapted, self.variables, self._rngs, self._mutable, (*self._path, name))


def _caller(model: nn.Module, method: Any, mutable: Any, capture: Any = False) -> Callable[..., Any]:
    if mutable is True:
        mutable = DenyList(["params", LORA])
    else:
        named = [mutable] if isinstance(mutable, str) else mutable if isinstance(mutable, list | tuple | set) else []
        if frozen := sorted({"params", LORA} & set(named)):
            raise ValueError(f"{frozen} cannot be mutable: an adapted model trains them, it does not mutate them.")

    def fn(params: Any, others: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        variables = {"params": params, **others}
        extra = {"capture_intermediates": capture} if capture else {}
        return model.apply(variables, *args, rngs=rngs, method=method, mutable=mutable, **extra, **kwargs)

    return fn


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
