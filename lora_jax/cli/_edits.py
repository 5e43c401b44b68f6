"""What an adapter does to each tensor of a base: naming it, checking it, and computing it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_jax.cli._adapter import Adapter, LowRank
from lora_jax.cli._show import listed
from lora_jax.peft_matching import is_target, names_targets
from lora_torch.hf_checkpoint import Checkpoint, Entry

# Where transformers stores (in, out) kernels: its Conv1D layers, by config.json's model_type.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
ROWS = 512  # rows updated at a time: a table of any size costs a few MB of float32 beside itself


class Change(NamedTuple):
    """What an adapter says about one tensor: a full value, factors to add, a vector to add, rows by their numbers."""

    full: np.ndarray | None = None
    factors: LowRank | None = None
    added: np.ndarray | None = None
    rows: tuple[tuple[int, ...], np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class Edit:
    """A change that was checked against its tensor, which it sees as (rows, columns).

    new = (full or base) + scale * left @ right + added, with DoRA times magnitude / its norm; or base with other `rows`
    """

    full: np.ndarray | None = None
    left: np.ndarray | None = None  # (rows, r) float32
    right: np.ndarray | None = None  # (r, columns) float32
    scale: float = 0.0
    added: np.ndarray | None = None
    magnitude: np.ndarray | None = None  # float32, one for each row, or for each column if `of_columns`
    of_columns: bool = False
    rows: tuple[np.ndarray, np.ndarray] | None = None  # (n,) row numbers and (n, columns) float32

    def apply(self, base: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Computes in float32 (float64 for a float64 base) and rounds once, to the base's dtype.

        **Returns:** the new tensor, and the squared norms of the change and of what rounding took from it.

        **Raises:** `ValueError` if a value is not finite: the factors hold NaN, or the dtype overflows.
        """
        if not base.size:
            return base, 0.0, 0.0
        out = np.empty(base.shape, base.dtype)
        rows = base.shape[0] if base.ndim else 1
        new, old, start = (x.reshape(rows, -1) for x in (out, base, base if self.full is None else self.full))
        exact = np.float64 if base.dtype == np.float64 else np.float32
        change = loss = 0.0
        squares = np.zeros(old.shape[1], np.float64)
        if self.magnitude is not None and self.of_columns:
            for i in range(0, rows, ROWS):
                squares += np.square(self._sum(start, slice(i, i + ROWS), exact), dtype=np.float64).sum(axis=0)
        for i in range(0, rows, ROWS):
            at = slice(i, i + ROWS)
            block = self._sum(start, at, exact)
            if self.magnitude is not None and self.of_columns:
                block *= _over(self.magnitude, squares).astype(exact)
            elif self.magnitude is not None:
                own = np.square(block, dtype=np.float64).sum(axis=1)
                block *= _over(self.magnitude[at], own).astype(exact)[:, None]
            if self.added is not None:
                block += self.added.reshape(rows, -1)[at].astype(exact)
            if self.rows is not None:
                numbers, values = self.rows
                here = (numbers >= i) & (numbers < i + len(block))
                block[numbers[here] - i] = values[here]
            with np.errstate(over="ignore", invalid="ignore"):  # reported below
                new[at] = block.astype(base.dtype)
            rounded = new[at].astype(exact)
            if not np.isfinite(rounded).all():
                raise ValueError(f"the result is not finite in {base.dtype}: NaN in a factor, or an overflow")
            change += _squared(block - old[at].astype(exact))
            loss += _squared(block - rounded)
        return out, change, loss

    def _sum(self, start: np.ndarray, at: slice, exact: type) -> np.ndarray:
        block = start[at].astype(exact)
        if self.left is not None and self.right is not None:
            block += exact(self.scale) * (self.left[at].astype(exact) @ self.right.astype(exact))
        return block


def _over(magnitude: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """`magnitude / sqrt(squares)`; 1 where there is nothing to give a length to, as in the library."""
    return np.where(squares == 0, 1.0, magnitude / np.sqrt(np.where(squares == 0, 1.0, squares)))


def _squared(x: np.ndarray) -> float:
    return float(np.vdot(x, x))


def changes_of(adapter: Adapter) -> dict[str, Change]:
    """Every change, by tensor name in the adapter's names."""
    low = {f"{module}.weight": factors for module, factors in adapter.modules.items()}
    added = {
        f"{module}.bias": np.float32(factors.scaling) * factors.bias
        for module, factors in adapter.modules.items()
        if factors.bias is not None
    }
    rows = {f"{module}.weight": found for module, found in adapter.rows.items()}
    names = sorted({*low, *added, *rows, *adapter.replaced})
    return {n: Change(adapter.replaced.get(n), low.get(n), added.get(n), rows.get(n)) for n in names}


def renaming(needed: Collection[str], available: Collection[str]) -> dict[str, str]:
    """{adapter's tensor name: base's tensor name} for all of `needed`.

    A checkpoint may lack the prefix of the model that was adapted (the Hub's gpt2 says `h.0`, GPT2LMHeadModel
    `transformer.h.0`), or have one more (a BertModel adapted, a BertForMaskedLM saved). transformers adds or
    drops such a prefix for a whole checkpoint, so one rule must fit all names.

    **Raises:** `ValueError` naming what is missing and the closest names there are.
    """
    firsts = list(dict.fromkeys(name.split(".", 1)[0] for name in available))
    own = {name.split(".", 1)[0] for name in needed}
    rules = [{name: name for name in needed}]
    rules += [{name: name.removeprefix(p + ".") for name in needed} for p in sorted(own - set(firsts))]
    rules += [{name: f"{prefix}.{name}" for name in needed} for prefix in firsts]
    for rule in rules:
        if all(name in available for name in rule.values()):
            return rule
    missing = sorted(name for name in needed if name not in available)
    told = [name + _nearest(name, available) for name in missing]
    raise ValueError(
        f"the base lacks {len(missing)} of the {len(needed)} tensors that the adapter changes: "
        f"{listed(told, 4)}. If the adapter was made on another class of this model (with a classification "
        "head, say), save the base from that class first, by `save_pretrained`."
    )


def _nearest(name: str, available: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(available), n=1, cutoff=0.7)
    return f" (closest: {close[0]})" if close else ""


def unadapted(adapter: Adapter, base: Checkpoint, names: Mapping[str, str]) -> list[str]:
    """Base modules that the adapter's targets cover but its file does not, in the adapter's names.

    `names` is the renaming of the changed tensors; its prefix is undone for all the others.
    """
    if not names_targets(adapter.config) or not names:
        return []
    ours, theirs = max(names.items(), key=lambda pair: abs(len(pair[0]) - len(pair[1])))
    gone, extra = ours[: max(len(ours) - len(theirs), 0)], theirs[: max(len(theirs) - len(ours), 0)]
    changed = set(names.values())
    modules = [
        gone + name.removeprefix(extra).removesuffix(".weight")
        for name, entry in base.entries.items()
        if name.endswith(".weight") and name.startswith(extra) and len(entry.shape) >= 2
        if name not in changed
    ]
    return sorted(module for module in modules if is_target(adapter.config, module))


def make_edit(name: str, entry: Entry, change: Change, adapter: Adapter, base: Checkpoint) -> Edit:
    """Checks a change against the base tensor `name`. **Raises:** `ValueError` naming it, and both shapes."""
    full, factors, added, rows = change
    if entry.dtype.kind in "biu":
        raise ValueError(f"{name} is {entry.dtype} in the base (quantised?); only floats can be changed")
    if rows is not None:
        return _row_edit(name, entry, change)
    if full is not None and full.shape != entry.shape:
        hint = "; if the vocabulary was resized, resize the base's too" if full.ndim == 2 else ""
        raise ValueError(f"{name}: the adapter's value is {full.shape}, the base's {entry.shape}{hint}")
    if added is not None and added.shape != entry.shape:
        raise ValueError(f"{name}: lora_B.bias is {added.shape}, the base's bias {entry.shape}")
    if factors is None:
        return Edit(full=full, added=added)
    if factors.groups > 1:
        raise ValueError(f"{name}: a grouped convolution's A sees all input channels and cannot be merged")
    made = (factors.b.shape[0], *factors.a.shape[1:])
    flipped = _is_flipped(name, made, entry, factors, adapter, base)
    made = made[::-1] if flipped else made
    if entry.shape != made:
        raise ValueError(
            f"{name} is {entry.shape} in the base, but A {factors.a.shape} and B {factors.b.shape} make {made}"
        )
    if factors.magnitude is not None and factors.magnitude.shape != factors.b.shape[:1]:
        raise ValueError(f"{name}: the magnitude is {factors.magnitude.shape}, but B {factors.b.shape}")
    left, right = factors.b.reshape(len(factors.b), -1), factors.a.reshape(len(factors.a), -1)
    if flipped:
        left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
    return Edit(full, left, right, factors.scaling, added, factors.magnitude, of_columns=flipped)


def _row_edit(name: str, entry: Entry, change: Change) -> Edit:
    assert change.rows is not None
    numbers, values = change.rows
    if change.full is not None or change.factors is not None:
        raise ValueError(f"{name} has trained rows, and factors or a whole value beside them: two values for one row")
    if len(entry.shape) != 2 or values.shape[1:] != entry.shape[1:]:
        raise ValueError(f"{name}: the trained rows are {values.shape}, the base's table {entry.shape}")
    if outside := [n for n in numbers if n >= entry.shape[0]]:
        raise ValueError(
            f"{name} has {entry.shape[0]} rows in the base, and the adapter trains row {outside[0]}; if the vocabulary "
            "was resized, resize the base's too"
        )
    return Edit(rows=(np.asarray(numbers), values))


def _is_flipped(
    name: str, made: tuple[int, ...], entry: Entry, factors: LowRank, adapter: Adapter, base: Checkpoint
) -> bool:
    """Whether the base stores (in, out). PEFT goes by the layer's class, which a file does not tell.

    So: by the module's name for GPT-2 and its kin, else by `fan_in_fan_out`. The flag alone would not do for
    GPT-2: PEFT keeps one for the whole adapter and overwrites it layer by layer.
    """
    if factors.kind != "linear":
        return factors.kind == "embedding"
    if base.config.get("model_type") in CONV1D_MODELS:
        return name.split(".")[-2] in CONV1D_MODULES
    return bool(adapter.config.get("fan_in_fan_out")) and entry.shape == made[::-1]
