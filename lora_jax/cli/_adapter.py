"""What `inspect`, `diff` and `merge` make of a PEFT LoRA directory: one low-rank update per module, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import products
from lora_jax.sites import LORA_BIAS, MAGNITUDE
from lora_torch.peft_read import DELTA, AdapterFile, read_described
from lora_torch.peft_settings import scaling
from lora_torch.peft_tokens import indices_of


@dataclass(frozen=True, eq=False)
class LowRank:
    """The factors of one module, as stored: torch's orientation, float32.

    `a` is (r, in), (r, in, *window) for a convolution or (r, vocabulary) for an embedding; `b` is (out, r),
    (out, r / groups, 1, ...) or (features, r). `kind` is "linear", "conv" or "embedding". `bias` (lora_bias) and
    `magnitude` (DoRA) are (out,).
    """

    kind: str
    a: np.ndarray
    b: np.ndarray
    alpha: float
    scaling: float
    bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def groups(self) -> int:
        return self.a.shape[0] // self.b.shape[1]

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """(out, r) and (r, in * window) in float64, whose product times `scaling` is the update.

        A grouped convolution's B is block diagonal; it is spelt out here, out x r numbers.
        """
        b, a = self.b.astype(np.float64), self.a.astype(np.float64)
        b, a = b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)
        if self.groups > 1:
            blocks, rows, columns = np.split(b, self.groups), b.shape[0] // self.groups, b.shape[1]
            b = np.zeros((b.shape[0], self.rank))
            for g, block in enumerate(blocks):
                b[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = block
        return b, a

    def norm(self) -> float:
        """||s B A||_F."""
        return abs(self.scaling) * products.frobenius(*self.matrices())


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter directory. Names are torch module paths, without `base_model.model.`."""

    directory: Path
    config: dict[str, Any]
    modules: dict[str, LowRank]
    # Full values of base tensors, by tensor name: modules_to_save, trained biases, saved embeddings.
    replaced: dict[str, np.ndarray]
    # DoRA magnitudes and trained token rows, by name: shown and compared.
    others: dict[str, np.ndarray]
    # Of these the token rows, by the module of their table: which rows, and their values (rows, features).
    rows: dict[str, tuple[tuple[int, ...], np.ndarray]]


def read_adapter(directory: Path | str) -> Adapter:
    """Reads a directory by `lora_torch.peft_read`, whose every key must have a role under its configuration.

    The configuration has PEFT's defaults for `r` and `lora_alpha` filled in.

    **Raises:** `ValueError` or `OSError` naming the file and every key that is unknown, unpaired, misshapen or not
    accounted for by the configuration, and settings under which the factors would mean something else.
    """
    file = read_described(directory)
    # Both change what lora_A and lora_B mean: the numbers shown would be wrong, not merely incomplete.
    for key in ("target_parameters", "use_qalora"):
        if file.config.get(key):
            file.problems.append(
                f"`{key}={file.config[key]!r}` is not supported here; `lora_torch.load_peft` reads it for a model, and "
                "`lora_jax.merge` merges it"
            )
    rows = {m: _rows(m, extras[DELTA], file) for m, extras in file.extras.items() if DELTA in extras}
    file.raise_if_any()
    config = {"r": 8, "lora_alpha": 8, **file.config}
    modules = {module: _low_rank(module, file) for module in file.pairs}
    # A targeted embedding or head is saved along with its factors.
    saved = {f"{module}.weight": value for module, value in file.bases.items()} | file.full
    others = {f"{m}.{name}": x for m, extras in file.extras.items() for name, x in extras.items() if name != LORA_BIAS}
    replaced, others = ({name: _float32(x) for name, x in found.items()} for found in (saved, others))
    return Adapter(file.directory, config, modules, replaced, others, rows)


def _low_rank(module: str, file: AdapterFile) -> LowRank:
    a, b = (_float32(file.pairs[module][part]) for part in "AB")
    kind = "embedding" if module in file.embeddings else "conv" if a.ndim > 2 else "linear"
    alpha, scale = scaling(file.config, module, a.shape[0])
    extras = file.extras.get(module, {})
    bias, magnitude = (None if (x := extras.get(name)) is None else _float32(x) for name in (LORA_BIAS, MAGNITUDE))
    return LowRank(kind, a, b, alpha, scale, bias, magnitude)


def _rows(module: str, values: np.ndarray, file: AdapterFile) -> tuple[tuple[int, ...], np.ndarray]:
    said = indices_of(file, module)
    if values.ndim != 2 or len(values) != len(said):
        file.problems.append(f"{module}: {DELTA} is {values.shape}, for the {len(said)} rows of the configuration")
    if len(set(said)) < len(said):
        file.problems.append(f"{module}: the configuration trains a row twice, {list(said)}")
    return said, _float32(values)


def _float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32, copy=False)
