"""The configuration of an adapter: frozen, validated when made, convertible to and from PEFT's."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

INITS = ("kaiming", "xavier", "gaussian", "orthogonal", "random")


@dataclass(frozen=True)
class LoRAConfig:
    """Which parameters to adapt, and how.

    **Fields:**

    - `rank`, `alpha`: delta = (alpha / rank) * A @ B; `use_rslora` divides by sqrt(rank) instead
      (Kalajdzievski, arXiv:2312.03732).
    - `target_modules`: a list of names (each matches a dotted name that equals it or ends with `"." + name`)
      or wildcards (`"*.layers.0.*.q_proj"`); a string that is a full-match regular expression or a wildcard;
      or `"all-linear"`. Names are those of modules (the path without the parameter's own name) or of parameters.
    - `exclude_modules`: the same forms; wins over `target_modules`.
    - `layers_to_transform`, `layers_pattern`: keep only these layer indices (suffix matches only), as in PEFT.
    - `rank_pattern`, `alpha_pattern`: `{pattern: value}`, first match wins; a pattern matches the end of a name.
    - `modules_to_save`: modules trained in full beside the factors (a new classification head, say).
    - `dropout`: probability on the input of the low-rank branch, in [0, 1). Active only when a key is given.
    - `init`: `"kaiming"` (A ~ U(±1/sqrt(fan_in)), B = 0: PEFT's default), `"xavier"`, `"gaussian"`,
      `"orthogonal"`, or `"random"` (A and B both random: PEFT's `init_lora_weights=False`, for tests).
    - `dtype`: of the factors; float32 unless told otherwise, whatever the base's dtype.

    **Raises:** `ValueError` or `TypeError` that says what to write instead.

    **Source:** Hu et al., arXiv:2106.09685; matching as in PEFT 0.21, except that an entry that matches
    nothing is an error here.
    """

    rank: int = 8
    alpha: float = 16
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    use_rslora: bool = False
    dropout: float = 0.0
    init: str = "kaiming"
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        _check_int("rank", self.rank)
        _check_number("alpha", self.alpha)
        object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules))
        if self.exclude_modules is not None:
            object.__setattr__(self, "exclude_modules", _names("exclude_modules", self.exclude_modules))
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"`modules_to_save={self.modules_to_save!r}` is a string; write [{self.modules_to_save!r}]."
            )
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save or ()))
        self._check_layers()
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise TypeError(f"`{name}` maps patterns to numbers, got {type(value).__name__}.")
            for key, number in value.items():
                (_check_int if name == "rank_pattern" else _check_number)(f"{name}[{key!r}]", number)
            object.__setattr__(self, name, dict(value))
        if isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout={self.dropout!r}` must be a probability in [0, 1), e.g. 0.05.")
        if self.init not in INITS:
            raise ValueError(f"`init={self.init!r}` is unknown; {_did_you_mean(str(self.init), INITS)}")
        object.__setattr__(self, "dtype", _float_dtype(self.dtype))

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if isinstance(layers, bool):
            raise ValueError(f"`layers_to_transform={layers}`: write layer numbers, such as 3 or [0, 1].")
        if isinstance(layers, int):
            layers = (layers,)
        if layers is not None:
            object.__setattr__(self, "layers_to_transform", tuple(layers))
        if isinstance(self.layers_pattern, str):
            object.__setattr__(self, "layers_pattern", (self.layers_pattern,))
        elif self.layers_pattern is not None:
            object.__setattr__(self, "layers_pattern", tuple(self.layers_pattern))
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError("`layers_pattern` names the list of layers; it needs `layers_to_transform`.")
        if self.layers_to_transform and isinstance(self.target_modules, str):
            raise ValueError(
                "`layers_to_transform` needs a list in `target_modules`; with a regular expression, "
                "put the layer numbers into the expression."
            )

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def replace(self, **changes: Any) -> LoRAConfig:
        """A copy with some fields changed, validated again."""
        _check_known(changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `LoRAConfig.from_dict` restores it."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            out[f.name] = list(value) if isinstance(value, tuple) else value
        out["rank_pattern"], out["alpha_pattern"] = dict(self.rank_pattern), dict(self.alpha_pattern)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoRAConfig:
        _check_known(data)
        return cls(**data)

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> LoRAConfig:
        """From the dictionary of an `adapter_config.json`; see `lora_jax.peft_config`."""
        from lora_jax.peft_config import from_peft

        return from_peft(data)

    def to_peft(self, **extra: Any) -> dict[str, Any]:
        """To the dictionary of an `adapter_config.json`; see `lora_jax.peft_config`."""
        from lora_jax.peft_config import to_peft

        return to_peft(self, **extra)


def _check_known(data: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(LoRAConfig)]
    for key in data:
        if key not in known:
            raise TypeError(f"`LoRAConfig` has no field `{key}`; {_did_you_mean(key, known)}")


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(choices)}."


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"`{name}={value!r}` must be a positive whole number, e.g. 8.")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise ValueError(f"`{name}={value!r}` must be a finite number, e.g. 16.")


def _names(name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"`{name}` is empty; name at least one module, or use 'all-linear'.")
        return value
    if not isinstance(value, Sequence | set | frozenset):
        raise TypeError(f"`{name}` takes a list of names or a string, got {type(value).__name__}.")
    names = tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)
    bad = [n for n in names if not isinstance(n, str) or not n]
    if bad:
        raise TypeError(f"`{name}` takes names, got {bad[0]!r}.")
    if not names and name == "target_modules":
        raise ValueError("`target_modules` is empty; name at least one module, or use 'all-linear'.")
    return names


def _float_dtype(dtype: Any) -> str:
    import jax.numpy as jnp  # after numpy: knows bfloat16

    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"`dtype={dtype!r}` is not a dtype; use 'float32' or 'bfloat16'.") from None
    if not jnp.issubdtype(resolved, jnp.floating):
        raise TypeError(f"`dtype={resolved.name}` cannot be trained; use 'float32' or 'bfloat16'.")
    return resolved.name
