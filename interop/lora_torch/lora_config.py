"""The one list of options of a torch adapter: `PeftConfig`, checked when it is made and again when it is used."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch

from .matching import ModuleMatcher

POSITIONS = ("pre", "post")
# "kaiming" and "uniform" are one: U(-1/sqrt(in), 1/sqrt(in)).
INITS = ("xavier", "kaiming", "uniform")
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TRITON_RANKS = 256  # what one block of a kernel holds

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


@dataclass
class PeftConfig:
    """What to adapt and how, with the fields, the order and the defaults of NeMo Automodel's `PeftConfig`.

    **Fields:**

    - `target_modules`, `exclude_modules`, `match_all_linear`: see `lora_torch.matching.ModuleMatcher`.
    - `dim`, `alpha`: the rank, and the numerator of the scale `alpha / dim`.
    - `dropout`, `dropout_position`: probability in [0, 1), on the input of the low-rank branch ("pre") or on its
      output ("post"); active in training mode.
    - `lora_A_init`: "xavier" (normal) or "kaiming", also called "uniform". `lora_B` starts at zero.
    - `lora_dtype`: of the factors, a dtype or its name; None: the base weight's. A quantised base has none to take.
    - `use_triton`: run on the kernels of `lora_jax/kernels/triton_*`. Needs a CUDA GPU when the model runs.
    - `use_dora` (keyword-only, as what follows): weight-decomposed adaptation, with a trained magnitude.
    - `use_memory_efficient_lora`: keep `x`, A and B for the backward pass and compute `x @ A` again there.
    - `moe_rank_scaling`: linear layers of experts get the rank `dim // active experts`; the scale is `alpha` over that.
      A model without any is reported in the log.

    **Raises:** `ValueError` or `TypeError` that says what to write instead.
    """

    target_modules: list[str] = field(default_factory=list)
    exclude_modules: list[str] = field(default_factory=list)
    match_all_linear: bool = False
    dim: int = 8
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "post"
    lora_A_init: str = "xavier"
    lora_dtype: torch.dtype | str | None = None
    use_triton: bool = False
    use_dora: bool = field(default=False, kw_only=True)
    use_memory_efficient_lora: bool = field(default=True, kw_only=True)
    moe_rank_scaling: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self.lora_dtype = dtype_of(self.lora_dtype)
        self.check()

    def check(self) -> None:
        """Raises unless every field has a value that can be used; fields may have changed since the last time."""
        if self.target_modules or self.exclude_modules:
            ModuleMatcher(self.target_modules, self.exclude_modules, self.match_all_linear)
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 1:
            raise ValueError(f"dim={self.dim!r} is the rank of the adapter: write a whole number, 1 or more")
        if self.use_triton and self.dim > TRITON_RANKS:
            raise ValueError(
                f"dim={self.dim}: the Triton kernels take ranks up to {TRITON_RANKS}; write use_triton=False"
            )
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha!r}: write a finite number; the scale is alpha / dim")
        if self.alpha == 0:
            raise ValueError("alpha=0 multiplies the adapter by zero, so nothing can train: leave modules out instead")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} is a probability: write a number in [0, 1), as 0.05")
        if self.dropout_position not in POSITIONS:
            raise ValueError(f'dropout_position={self.dropout_position!r}: write "pre" or "post"')
        if self.lora_A_init not in INITS:
            raise ValueError(f"lora_A_init={self.lora_A_init!r}: {_nearest(str(self.lora_A_init), INITS)}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: write True or False")
        self.lora_dtype = dtype_of(self.lora_dtype)

    def matcher(self) -> ModuleMatcher:
        return ModuleMatcher(self.target_modules, self.exclude_modules, self.match_all_linear)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON: a dtype is written by its name. `PeftConfig.from_dict` restores it."""
        values = asdict(self)
        if self.lora_dtype is not None:
            values["lora_dtype"] = str(self.lora_dtype).removeprefix("torch.")
        return values

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> PeftConfig:
        """From a dictionary of fields; those left out have their defaults. **Raises** `TypeError` for others."""
        known = [each.name for each in fields(cls)]
        for name in d:
            if name not in known:
                raise TypeError(f"PeftConfig has no field {name!r}; {_nearest(str(name), known)}")
        return cls(**d)


_SWITCHES = ("match_all_linear", "use_triton", "use_dora", "use_memory_efficient_lora", "moe_rank_scaling")


def dtype_of(value: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by itself, by its name ("bfloat16", "torch.bfloat16") or by a short one ("bf16").

    **Raises:** `ValueError` for what is none, `TypeError` for one that factors cannot have.
    """
    if value is None:
        return None
    found: Any = value
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        found = getattr(torch, _SHORT_DTYPES.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f'lora_dtype={value!r} is not a dtype: write torch.bfloat16 or "bfloat16"')
    if found not in COMPUTE_DTYPES:
        raise TypeError(f"lora_dtype={value!r}: factors are float64, float32, float16 or bfloat16")
    return found


def _nearest(word: str, choices: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(choices)}"
