"""The configuration of an adapter: frozen, validated when made, convertible to and from PEFT's."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

# What `re.compile` raises: huge repetitions and deep nesting have errors of their own.
NOT_A_REGEX = (re.error, OverflowError, RecursionError)

BIASES = ("none", "all", "lora_only")
INITS = ("kaiming", "xavier", "gaussian", "orthogonal", "random")
# Functions of `lora_jax.inits`: they need weights or data, and most of them return another base.
COMPUTED_INITS = {
    "pissa": "adapter, params = inits.pissa(plan, params)",
    "olora": "adapter, params = inits.olora(plan, params)",
    "loftq": "adapter, params = inits.loftq(plan, params)",
    "corda": "adapter, params = inits.corda(plan, fn, params, batches)",
    "eva": "adapter = inits.eva(plan, fn, params, batches)",
    "lora_ga": "adapter, params = inits.lora_ga(plan, loss, params, batches)",
}


@dataclass(frozen=True)
class LoRAConfig:
    """Which parameters to adapt, and how.

    **Fields:**

    - `rank`, `alpha`: delta = (alpha / rank) * A @ B, alpha not 0; `use_rslora` divides by sqrt(rank) instead
      (Kalajdzievski, arXiv:2312.03732).
    - `target_modules`: a list of names (each matches a dotted name that equals it or ends with `"." + name`)
      or wildcards (`"*.layers.0.*.q_proj"`); a string that is a full-match regular expression or a wildcard;
      or `"all-linear"`. Names are those of modules (the path without the parameter's own name) or of parameters.
    - `exclude_modules`: the same forms; wins over `target_modules`.
    - `layers_to_transform`, `layers_pattern`: keep only these layers; an entry of `target_modules` that spells
      out a whole name is kept in any layer, as in PEFT.
    - `rank_pattern`, `alpha_pattern`: `{pattern: value}`, first match wins; a pattern matches the end of a name.
    - `use_dora`: train a magnitude for each output beside the factors, which then change the direction only (Liu et
      al., arXiv:2402.09353). Costs a pass over each weight per call, and with dropout a second product.
    - `lora_bias`: a bias on B, scaled as B is; not on embeddings, and not with `use_dora`.
    - `bias`: which parameters called `bias` are trained in full: `"none"`, `"all"` of the model, or `"lora_only"`,
      those of adapted modules.
    - `trainable_token_indices`: rows of the model's embedding table to train, `[32000, 32001]`, or of the tables named:
      `{"embed_tokens": [32000]}`. A head tied to the table changes with it.
    - `use_qalora`, `qalora_group_size`: A reads sums over groups of neighbouring inputs (Xu et al., arXiv:2309.14717),
      scaled as in PEFT; linear layers only, whose inputs the group size divides.
    - `layer_replication`: the ranges by which `replicate_layers` made the model deeper, for PEFT, which repeats its own
      layers by them; here the function is deeper already.
    - `modules_to_save`: modules trained in full beside the factors (a new classification head, say).
    - `dropout`: probability on the input of the low-rank branch, in [0, 1), kept to 1/65536. Active only when a key is
      given, and not on embeddings that are looked up; the plan notes every parameter on which it has no effect.
    - `init`: `"kaiming"` (A ~ U(±1/sqrt(fan_in)), B = 0: PEFT's default), `"xavier"`, `"gaussian"`,
      `"orthogonal"`, or `"random"` (A and B both random: PEFT's `init_lora_weights=False`, for tests). Values computed
      from weights or data (PiSSA, EVA, …) are functions, in `lora_jax.inits`.
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
    use_dora: bool = False
    lora_bias: bool = False
    use_qalora: bool = False
    qalora_group_size: int = 16
    bias: str = "none"
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    layer_replication: Sequence[Sequence[int]] | None = None
    dropout: float = 0.0
    init: str = "kaiming"
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        set_("rank", _whole("rank", self.rank, least=1))
        set_("alpha", _alpha("alpha", self.alpha))
        set_("target_modules", _names("target_modules", self.target_modules))
        if self.exclude_modules is not None:
            set_("exclude_modules", _names("exclude_modules", self.exclude_modules))
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"`modules_to_save={self.modules_to_save!r}` is a string; write [{self.modules_to_save!r}]."
            )
        set_("modules_to_save", _names("modules_to_save", self.modules_to_save or ()))
        self._check_layers()
        for name, check in (("rank_pattern", functools.partial(_whole, least=1)), ("alpha_pattern", _alpha)):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise TypeError(f"`{name}` maps patterns to numbers, got {type(value).__name__}.")
            set_(name, {_regex(name, key): check(f"{name}[{key!r}]", number) for key, number in value.items()})
        for name in ("use_rslora", "use_dora", "lora_bias", "use_qalora"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_):
                raise TypeError(f"`{name}={value!r}`: write True or False.")
            set_(name, bool(value))
        if self.lora_bias and self.use_dora:
            raise ValueError("`lora_bias` with `use_dora`: a magnitude has no place for a bias on B; choose one.")
        set_("trainable_token_indices", _tokens(self.trainable_token_indices))
        set_("qalora_group_size", _whole("qalora_group_size", self.qalora_group_size, least=1, hint="16"))
        if self.use_qalora and self.use_dora:
            raise ValueError("`use_qalora` with `use_dora`: PEFT has no such combination; choose one.")
        set_("layer_replication", check_ranges(self.layer_replication))
        if self.bias not in BIASES:
            raise ValueError(f"`bias={self.bias!r}` is unknown; {_did_you_mean(str(self.bias), BIASES)}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout={self.dropout!r}` must be a probability in [0, 1), e.g. 0.05.")
        set_("dropout", _plain(self.dropout))
        if self.init not in INITS:
            raise ValueError(f"`init={self.init!r}` {_no_init(str(self.init))}")
        set_("dtype", _float_dtype(self.dtype))

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is not None:
            if isinstance(layers, str) or not isinstance(layers, Iterable):
                layers = (layers,)
            layers = tuple(_whole("layers_to_transform", i, least=0, hint="[0, 1]") for i in layers)
            if not layers:
                raise ValueError("`layers_to_transform` is empty, so nothing is left; write None to keep every layer.")
            object.__setattr__(self, "layers_to_transform", layers)
        lists = self.layers_pattern
        if lists is not None:
            object.__setattr__(
                self, "layers_pattern", _names("layers_pattern", (lists,) if isinstance(lists, str) else lists)
            )
        if self.layers_pattern and layers is None:
            raise ValueError("`layers_pattern` names the list of layers; it needs `layers_to_transform`.")
        if layers is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "`layers_to_transform` needs a list in `target_modules`; with a regular expression, "
                "put the layer numbers into the expression."
            )

    # Of two patterns that match, the first counts: configurations that differ only in their order are not equal.
    def _key(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(tuple(v.items()) if isinstance(v, Mapping) else v for v in values)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, LoRAConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

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
            out[f.name] = [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, tuple) else value
        out["rank_pattern"], out["alpha_pattern"] = dict(self.rank_pattern), dict(self.alpha_pattern)
        if isinstance(self.trainable_token_indices, Mapping):
            out["trainable_token_indices"] = {k: list(v) for k, v in self.trainable_token_indices.items()}
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


def _no_init(name: str) -> str:
    """Why this is no value of `init`, and what to write."""
    word = name.lower().partition("_niter_")[0].replace("-", "_")
    computed = "lora_ga" if word == "loraga" else word
    if computed not in COMPUTED_INITS:
        return f"is unknown; {_did_you_mean(name, INITS)}"
    return (
        "is computed, from more than a key: leave `init` out, plan, and call "
        f"`{COMPUTED_INITS[computed]}` (`from lora_jax import inits`)."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A number of NumPy's as Python's, which JSON can hold."""
    return value.item() if isinstance(value, np.generic) else value


def _whole(name: str, value: Any, least: int, hint: str = "8") -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        kind = "a positive whole number" if least else "whole numbers, 0 or more"
        raise ValueError(f"`{name}={value!r}` must be {kind}, e.g. {hint}.")
    return int(value)


def _alpha(name: str, value: Any) -> int | float:
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"`{name}={value!r}` must be a finite number, e.g. 16.")
    if value == 0:
        raise ValueError(
            f"`{name}={value!r}` multiplies every change by zero, so nothing could ever train; "
            "leave modules out with `exclude_modules`."
        )
    return _plain(value)


def _tokens(value: Any) -> Any:
    """Rows by the name of their table, `""` for the model's embedding; None where there are none."""
    if value is None or (isinstance(value, Sequence | Mapping) and not value):
        return None
    if not isinstance(value, Mapping):
        return _rows("trainable_token_indices", value)
    return {name: _rows(f"trainable_token_indices[{name!r}]", rows) for name, rows in value.items()}


def check_ranges(value: Any) -> tuple[tuple[int, int], ...] | None:
    """Ranges of layers as pairs. **Raises:** `ValueError` for anything else."""
    if value is None or (isinstance(value, Sequence) and not value):
        return None
    out = []
    for pair in value if isinstance(value, Sequence) else [value]:
        ends = list(pair) if isinstance(pair, Sequence) else []
        if len(ends) != 2 or not all(isinstance(n, int) for n in ends) or not 0 <= ends[0] < ends[1]:
            raise ValueError(f"`layer_replication={value!r}` is no list of ranges; write e.g. [[0, 4], [2, 5]].")
        out.append((ends[0], ends[1]))
    return tuple(out)


def _rows(name: str, rows: Any) -> tuple[int, ...]:
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise TypeError(f"`{name}={rows!r}` is no list of rows; write e.g. [32000, 32001].")
    out = tuple(_whole(name, row, least=0, hint="[32000, 32001]") for row in rows)
    if len(set(out)) < len(out) or not out:
        raise ValueError(f"`{name}={list(out)}` must name one row or more, each once.")
    return out


def _regex(name: str, key: Any) -> str:
    if not isinstance(key, str) or not key:
        raise TypeError(f"`{name}` maps names or regular expressions to numbers, got the key {key!r}.")
    try:
        re.compile(rf"(.*\.)?({key})$")
    except NOT_A_REGEX as error:
        raise ValueError(
            f"`{name}` key {key!r} is not a regular expression ({error}). It is matched against the end of a name: "
            r"write 'q_proj' for every q_proj, or 'layers\.0\..*q_proj'."
        ) from None
    return key


_AT_LEAST_ONE = {
    "target_modules": "name at least one module, or use 'all-linear'",
    "exclude_modules": "name the modules to leave out, or write None",
}


def _names(name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"`{name}` is empty; {_AT_LEAST_ONE[name]}.")
        if name == "exclude_modules" and value.lower() == "all-linear":
            raise ValueError("`exclude_modules='all-linear'` would leave nothing; name the modules to leave out.")
        if name in _AT_LEAST_ONE:
            from lora_jax.targets import Patterns

            Patterns(value)  # raises for what is neither a regular expression nor a wildcard
        return value
    if not isinstance(value, Sequence | set | frozenset):
        raise TypeError(f"`{name}` takes a list of names or a string, got {type(value).__name__}.")
    names = tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)
    bad = [n for n in names if not isinstance(n, str) or not n]
    if bad:
        raise TypeError(f"`{name}` takes names, got {bad[0]!r}.")
    if not names and name == "target_modules":
        raise ValueError(f"`target_modules` is empty; {_AT_LEAST_ONE[name]}.")
    if name == "target_modules" and (word := next((n for n in names if n.lower() == "all-linear"), None)):
        raise ValueError(
            f"`target_modules` lists {word!r}, which would be a module of that name; write the string itself, "
            "target_modules='all-linear'."
        )
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
