"""`LoraModel`: an nnx module with any number of named adapters over one base, under PEFT's names.

It keeps track of what is active, what is merged, and what the base was before. What computes is elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from lora_jax import planning, status
from lora_jax.adapters import Adapter, as_adapter
from lora_jax.combining import METHODS, combine
from lora_jax.config import LoRAConfig
from lora_jax.merging import merge
from lora_jax.nnx import AdaptedModule, Static, variables
from lora_jax.nnx_call import BASE_PARAMS, Call
from lora_jax.peft.config import LoraConfig
from lora_jax.peft.initial import initial
from lora_jax.peft.known import FrozenLoRA, Known, Moved, replanned
from lora_jax.peft.layer import LoraLayer
from lora_jax.planning import Plan


class LoraModel(AdaptedModule):
    """PEFT's `LoraModel` over a Flax nnx module, whose own arrays and variables stay as they are.

    **Arguments:**

    - `model`: any nnx module (`lora_jax.peft.from_linen` makes one of a linen module and its parameters).
    - `config`, `adapter_name`: as in PEFT; None for a model without adapters yet.
    - `inputs`: an example call, to learn how each parameter is used: a tuple of arguments or a dictionary of keyword
      arguments, arrays or `jax.ShapeDtypeStruct`s. Nothing is computed.
    - `rngs`: draw factors and dropout masks; `nnx.Rngs(0)` if None.
    - `batches`, `loss`, `mask`: for the initialisers that need data, as in `lora_jax.inits`; `loss(model, *batch)`.

    The factors of active adapters are `nnx.LoRAParam`s, so
    `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` trains what PEFT would; those of others are `FrozenLoRA`s. Other
    attributes and methods are the base's, run adapted.
    """

    def __init__(
        self,
        model: nnx.Module,
        config: LoraConfig | None,
        adapter_name: str = "default",
        *,
        inputs: Any,
        rngs: nnx.Rngs | None = None,
        batches: Iterable[Any] | None = None,
        loss: Callable[..., jax.Array] | None = None,
        mask: Callable[..., jax.Array] | None = None,
    ):
        if config is not None and not isinstance(config, LoraConfig):
            raise TypeError(f"`config` is a {type(config).__name__}: write a `lora_jax.peft.LoraConfig`.")
        if not isinstance(inputs, tuple | list | Mapping):
            raise TypeError(
                f"`inputs` is a {type(inputs).__name__}: write the tuple of a call's arguments, `inputs=(x,)`, or a "
                "dictionary of keyword arguments."
            )
        self.base = nnx.clone(model)  # other variables, the same arrays
        self.lora = nnx.Dict({})
        self.lora_implementation = None
        self.lora_rngs = nnx.Rngs(lora=(rngs or nnx.Rngs(0)).lora())
        self.deterministic = False
        self._inputs = Static(jax.tree.map(_abstract, inputs))
        self._known = Static({})
        self._unmerged = Static(None)  # the base's parameters as they were before merging
        self._moved = Static(None)  # `Moved`, if an initialiser changed the base
        self._active: tuple[str, ...] = ()
        self._merged: tuple[str, ...] = ()
        self._enabled = True
        if config is not None:
            self.add_adapter(adapter_name, config, batches=batches, loss=loss, mask=mask)
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    # -- what there is

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        return {name: known.config for name, known in self._known.value.items()}

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def merged_adapters(self) -> list[str]:
        return list(self._merged)

    def adapter(self, adapter_name: str = "default") -> Adapter:
        """The factors of one adapter as a value, for every function of this library."""
        self._must_know(adapter_name)
        leaves = nnx.to_pure_dict(nnx.state(self.lora[adapter_name]))
        return as_adapter(leaves, self._known.value[adapter_name].plan.sites)

    @property
    def params(self) -> Any:
        """The base's parameters, merged adapters included."""
        return nnx.state(self.base, BASE_PARAMS)

    def get_base_model(self) -> nnx.Module:
        return self.base

    def lora_layers(self) -> dict[str, LoraLayer]:
        """A view of each adapted parameter, by name, with PEFT's attributes of a `LoraLayer`."""
        paths = dict.fromkeys(s.path for known in self._known.value.values() for s in known.plan.sites if s.is_low_rank)
        return {".".join(path): LoraLayer(self, path) for path in paths}

    @property
    def lora_plan(self) -> Static:
        """The plan of what is active (`lora_jax.nnx.plan_of`)."""
        return Static(self._in_use()[0])

    # -- adapters come and go

    def add_adapter(
        self,
        adapter_name: str,
        config: LoraConfig,
        *,
        batches: Iterable[Any] | None = None,
        loss: Callable[..., jax.Array] | None = None,
        mask: Callable[..., jax.Array] | None = None,
    ) -> None:
        """Adds an adapter, inactive.

        **Raises:** `ValueError` for a name that is taken, for a model whose base another adapter's initialiser changed,
        and as `lora_jax.plan`.
        """
        self._must_be_new(adapter_name)
        self._must_have_its_base(adapter_name)
        call = self._call()
        plan = planning.plan(call.fn, call.params, call.state, call.inputs, config=config.to_lora())
        graphdef, _, rest = nnx.split(self.base, BASE_PARAMS, ...)

        def fn(params: Any, *args: Any, **kwargs: Any) -> Any:
            return nnx.merge(graphdef, params, rest)(*args, **kwargs)

        def of_model(params: Any, *args: Any, **kwargs: Any) -> jax.Array:
            assert loss is not None
            return loss(nnx.merge(graphdef, params, rest), *args, **kwargs)

        # Magnitudes and copies start from the base that this adapter is for, whatever is merged into it just now.
        params = self._unmerged_params()
        start, new = initial(config, plan, params, self.lora_rngs.lora(), fn, batches, of_model if loss else None, mask)
        changes_base = new is not params
        if changes_base and (self._known.value or self._merged):
            raise ValueError(
                f"`init_lora_weights={config.init_lora_weights!r}` changes the base, on which other adapters rely "
                f"({', '.join(self._known.value)}): make a model of its own."
            )
        if changes_base:
            nnx.update(self.base, new)
            self._moved = Static(Moved(str(config.init_lora_weights), plan, start))
        self._put(adapter_name, start, Known(plan, config, start.sites))

    def delete_adapter(self, adapter_name: str) -> None:
        """**Raises** `ValueError` for an unknown or a merged adapter."""
        self._must_know(adapter_name)
        if adapter_name in self._merged:
            raise ValueError(f"{adapter_name!r} is merged: `unmerge_adapter()` first.")
        self._known = Static({n: k for n, k in self._known.value.items() if n != adapter_name})
        del self.lora[adapter_name]
        if adapter_name in self._active:
            left = tuple(name for name in self._active if name != adapter_name) or tuple(sorted(self._known.value))[:1]
            if left and len(self._active) == 1:
                warnings.warn(f"{adapter_name!r} was active; {left[0]!r} is now.", stacklevel=2)
            self.set_adapter(list(left))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates one adapter or several, whose changes then add up, and makes them trainable."""
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        for name in names:
            self._must_know(name)
        if len(set(names)) < len(names):
            raise ValueError(f"`set_adapter({list(names)})` names an adapter twice, which would count twice.")
        if self._merged:
            warnings.warn(f"unmerges {', '.join(self._merged)} before another adapter is set.", stacklevel=2)
            self.unmerge_adapter()
        self._active = names
        for name in self._known.value:
            self._set_kind(name, nnx.LoRAParam if name in names and not inference_mode else FrozenLoRA)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        key: jax.Array | None = None,
    ) -> None:
        """PEFT's, by `lora_jax.combine`. The new adapter is inactive. `svd_full_matrices` and `svd_driver` choose
        among torch's ways to the same result and do nothing here.

        **Arguments:** `key`: for `"dare_*"`; `jax.random.key(0)` if None.

        **Raises:** `ValueError` for a name that is taken, and as `combine`.
        """
        self._must_be_new(adapter_name)
        if combination_type not in METHODS:
            raise ValueError(f"`combination_type={combination_type!r}` is unknown; use one of {', '.join(METHODS)}.")
        by_chance = combination_type.startswith("dare")
        combined = combine(
            [self.adapter(name) for name in adapters], list(weights), combination_type, rank=svd_rank, density=density,
            majority_sign=majority_sign_method, clamp=svd_clamp,
            key=(jax.random.key(0) if key is None else key) if by_chance else key,
        )  # fmt: skip
        first = self._known.value[adapters[0]]
        rank = max(site.rank for site in combined.sites)
        config = dataclasses.replace(
            first.config, r=rank, lora_alpha=rank, use_rslora=False, use_qalora=False, rank_pattern={},
            alpha_pattern={}, init_lora_weights=True,
            target_modules=sorted({site.module or site.name for site in combined.sites}),
            exclude_modules=None, layers_to_transform=None, layers_pattern=None, target_parameters=None,
        )  # fmt: skip
        self._put(adapter_name, combined, Known(first.plan, config, combined.sites))

    # -- merged or not, in use or not

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Folds adapters (the active ones if None) into the base of this model, which remembers what it was."""
        _refuse_a_string(adapter_names)
        names = list(self._active if adapter_names is None else adapter_names)
        for name in names:
            self._must_know(name)
        if again := [name for name in names if name in self._merged]:
            warnings.warn(f"{', '.join(again)}: merged already.", stacklevel=2)
        before = params = self.params
        new = [name for name in names if name not in self._merged]
        for name in new:
            params = merge(params, self.adapter(name), safe=safe_merge)
        if not new:
            return
        if self._unmerged.value is None:
            self._unmerged = Static(jax.tree.map(lambda leaf: leaf, before))
        nnx.update(self.base, params)
        self._merged = (*self._merged, *new)

    def unmerge_adapter(self) -> None:
        """The base as it was, bit for bit."""
        if not self._merged:
            warnings.warn("nothing is merged.", stacklevel=2)
            return
        nnx.update(self.base, self._unmerged.value)
        self._merged, self._unmerged = (), Static(None)

    def merge_and_unload(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> nnx.Module:
        """A new module like the base, with the adapters folded in. This model stays as it is."""
        _refuse_a_string(adapter_names)
        names = self._active if adapter_names is None else adapter_names
        params = self.params
        for name in names:
            if name not in self._merged:
                params = merge(params, self.adapter(name), safe=safe_merge)
        out = nnx.clone(self.base)
        nnx.update(out, params)
        return out

    def unload(self) -> nnx.Module:
        """A new module like the base, without any adapter; what an initialiser took from the base is given back."""
        out, params, start = nnx.clone(self.base), self._unmerged_params(), self._taken()
        nnx.update(out, params if start is None else merge(params, start))
        return out

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base without adapters inside of `with`; afterwards all is as before, merged adapters included.

        That is the base which the model was made of, whatever an initialiser took from it; after LoftQ, the quantised.
        """
        enabled, merged = self._enabled, self._merged
        if merged:
            self.unmerge_adapter()
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = enabled
            if merged:
                self.merge_adapter(merged)

    def disable_adapter_layers(self) -> None:
        if self._merged:
            self.unmerge_adapter()
        self._enabled = False

    def enable_adapter_layers(self) -> None:
        self._enabled = True

    # -- reports

    def get_layer_status(self) -> list[status.LayerStatus]:
        return status.layer_status(self._adapters(), **self._use())

    def get_model_status(self) -> status.ModelStatus:
        return status.model_status(self.params, self._adapters(), **self._use())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        return status.parameter_counts(self.params, self._adapters(), self._trained())

    def print_trainable_parameters(self) -> None:
        print(status.trainable_parameters(*self.get_nb_trainable_parameters()))

    # -- inside

    def _in_use(self) -> tuple[Plan, Adapter | None]:
        names = [name for name in self._active if name not in self._merged] if self._enabled else []
        if not names:
            return self._without_any()
        plans = [self._known.value[name].plan for name in names]
        if len(names) == 1:
            return plans[0], self.adapter(names[0])
        if len({plan.config.dropout for plan in plans}) > 1 and not self.deterministic:
            raise ValueError(f"{', '.join(names)} have different dropout: train one of them, or call `eval()`.")
        together = combine([self.adapter(name) for name in names], [1.0] * len(names), "cat")
        return replanned(plans[0], together), together

    def _without_any(self) -> tuple[Plan, Adapter | None]:
        """The base as it was: that of this model, with what was taken from it put back."""
        start = None if self._merged else self._taken()
        if start is None:
            return planning.Plan(LoRAConfig(), (), ()), None
        plan = self._moved.value.plan
        return dataclasses.replace(plan, config=plan.config.replace(dropout=0.0)), start

    def _unmerged_params(self) -> Any:
        return self._unmerged.value if self._merged else self.params

    def _taken(self) -> Adapter | None:
        """The factors that hold a part of the base. What quantising took away is in none."""
        moved = self._moved.value
        return None if moved is None or moved.init == "loftq" else moved.start

    def _call(self) -> Call:
        inputs = self._inputs.value
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        return Call(self.base, (), "__call__", args, kwargs)

    def _put(self, name: str, adapter: Adapter, known: Known) -> None:
        known = dataclasses.replace(known, plan=replanned(known.plan, adapter))
        self._known = Static({**self._known.value, name: known})
        kind = nnx.LoRAParam if name in self._trained() else FrozenLoRA
        self.lora[name] = variables(adapter.to_dict(), kind)

    def _set_kind(self, name: str, kind: type[nnx.Variable]) -> None:
        self.lora[name] = variables(self.adapter(name).to_dict(), kind)

    def _adapters(self) -> dict[str, Adapter]:
        return {name: self.adapter(name) for name in self._known.value}

    def _trained(self) -> list[str]:
        return [name for name in self._active if name in self.lora and nnx.state(self.lora[name], nnx.LoRAParam)]

    def _use(self) -> dict[str, Any]:
        frozen = [name for name in self._active if name not in self._trained()]
        return {"active": self._active, "merged": self._merged, "frozen": frozen, "enabled": self._enabled}

    def _must_know(self, name: str) -> None:
        if name not in self._known.value:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(map(repr, self._known.value))}.")

    def _must_have_its_base(self, name: str) -> None:
        if (moved := self._moved.value) is not None:
            raise ValueError(
                f"`init_lora_weights={moved.init!r}` changed the base of this model, so that {name!r} would not be an "
                "adapter for the base it was made of: make a model of its own."
            )

    def _must_be_new(self, name: str) -> None:
        # It becomes the name of a folder in `save_pretrained`.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"`adapter_name={name!r}` must be usable as the name of one folder, e.g. 'default'.")
        if name in self._known.value:
            raise ValueError(f"there is an adapter {name!r} already: choose another name, or delete it first.")


def _refuse_a_string(adapter_names: Any) -> None:
    if isinstance(adapter_names, str):
        raise TypeError(f"`adapter_names={adapter_names!r}` is a string; write [{adapter_names!r}].")


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf
