"""Strict reading of a PEFT LoRA directory, on safetensors and numpy alone.

PEFT itself drops what it does not recognise and lets a stray key overwrite a base tensor. Here every key of
the file must have a role under its `adapter_config.json`, or nothing is returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.cli import _lowrank
from lora_jax.cli._adapter_config import is_target, names_targets, pattern_values, read_config, saved_modules
from lora_jax.cli._tensors import open_safetensors, read_floats

PREFIX = "base_model.model."
# What a key ends with -> which part of its module it is.
PARTS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_B.bias",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",  # a spelling that some exporters use
    ".token_adapter.trainable_tokens_delta": "trainable_tokens_delta",
}


@dataclass(frozen=True, eq=False)
class LowRank:
    """The factors of one module, as stored: torch's orientation, float32.

    `a` is (r, in), (r, in, *window) for a convolution or (r, vocabulary) for an embedding; `b` is (out, r),
    (out, r / groups, 1, ...) or (features, r). `kind` is "linear", "conv" or "embedding".
    """

    kind: str
    a: np.ndarray
    b: np.ndarray
    alpha: float
    scaling: float
    bias: np.ndarray | None = None

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
        return abs(self.scaling) * _lowrank.frobenius(*self.matrices())


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter directory. Names are torch module paths, without `base_model.model.`."""

    directory: Path
    config: dict[str, Any]
    modules: dict[str, LowRank]
    # Full values of base tensors, by tensor name: modules_to_save, trained biases, saved embeddings.
    replaced: dict[str, np.ndarray]
    # DoRA magnitudes and trained token rows, by name: shown and compared, not merged.
    others: dict[str, np.ndarray]


def read_adapter(directory: Path | str) -> Adapter:
    """Reads `adapter_config.json` and `adapter_model.safetensors`.

    Ranks come from the tensors: PEFT writes its JSON sorted, so that overlapping patterns may resolve
    differently after a save. Alphas follow PEFT's own rule, the first matching pattern in file order.

    **Raises:** `ValueError` or `OSError` naming the file and every key that is unknown, unpaired, misshapen
    or not accounted for by the configuration.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory.")
    config = read_config(directory)
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        if (directory / "adapter_model.bin").is_file():
            raise ValueError(
                f"{directory} has only adapter_model.bin, a pickle, which is not read here: save the adapter "
                "again with PEFT's `save_pretrained`, which writes safetensors."
            )
        raise ValueError(f"{directory} holds no adapter_model.safetensors.")
    with open_safetensors(path) as file:
        tensors = read_floats(file, path)
    parts, replaced, problems = _sort(tensors, config)
    if not tensors:
        problems.append("it holds no tensors")
    modules: dict[str, LowRank] = {}
    others: dict[str, np.ndarray] = {}
    for module, found in parts.items():
        for part in ("trainable_tokens_delta", "lora_magnitude_vector"):
            if part in found:
                others[f"{module}.{part}"] = found[part]
        if set(found) == {"trainable_tokens_delta"}:
            continue
        if config.get("use_dora") and "lora_magnitude_vector" not in found:
            problems.append(f"{module} has no lora_magnitude_vector although use_dora is true")
        try:
            modules[module] = _low_rank(module, found, config)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{path} is not accepted: {listed(problems)}.")
    return Adapter(directory, config, modules, replaced, others)


def listed(problems: list[str], most: int = 8) -> str:
    """Joins problems into one line, the first `most` in full."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


Parts = dict[str, dict[str, np.ndarray]]


def _sort(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[Parts, dict[str, np.ndarray], list[str]]:
    """Gives every key its role. **Returns:** ({module: {part: array}}, {base tensor: array}, problems)."""
    parts: Parts = {}
    rest: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for key, value in tensors.items():
        ending = next((e for e in PARTS if key.endswith(e)), None)
        name = key.removeprefix(PREFIX)
        if name == key:
            problems.append(f"{key} does not start with {PREFIX}")
        elif ending is None:
            rest[name] = value
        else:
            module, part = name.removesuffix(ending), PARTS[ending]
            if not _expected(part, module, config):
                problems.append(f"{key} does not belong to the configuration")
            parts.setdefault(module, {})[part] = value
    replaced: dict[str, np.ndarray] = {}
    for name, value in rest.items():
        base = _base_tensor(name, parts, config)
        if base is not None:
            replaced[base] = value
    for name, value in rest.items():
        if _base_tensor(name, parts, config) is not None:
            continue
        # With ensure_weight_tying PEFT saves the tied head as well, without naming it in modules_to_save.
        if config.get("ensure_weight_tying") and any(np.array_equal(value, v) for v in replaced.values()):
            replaced[name] = value
        else:
            problems.append(f"{PREFIX}{name} has no role in this adapter (see its modules_to_save and bias)")
    return parts, replaced, problems


def _expected(part: str, module: str, config: Mapping[str, Any]) -> bool:
    options = {
        "lora_B.bias": "lora_bias",
        "lora_magnitude_vector": "use_dora",
        "trainable_tokens_delta": "trainable_token_indices",
    }
    if part in options:
        return bool(config.get(options[part]))
    # With ensure_weight_tying PEFT adapts the tied head too and leaves it out of target_modules.
    return not names_targets(config) or bool(config.get("ensure_weight_tying")) or is_target(config, module)


def _base_tensor(name: str, parts: Parts, config: Mapping[str, Any]) -> str | None:
    """The base tensor that the plain key `name` replaces, or None if the configuration does not allow it."""
    module, _, parameter = name.rpartition(".")
    bias = config.get("bias") or "none"
    if module.endswith(".base_layer"):
        adapted = module.removesuffix(".base_layer")
        # A targeted embedding or head is saved along with its factors; a bias only if it was trained.
        allowed = parameter == "weight" or (parameter == "bias" and bias in ("all", "lora_only"))
        return f"{adapted}.{parameter}" if allowed and adapted in parts else None
    if parameter == "bias" and bias == "all":
        return name
    pieces = module.split(".")
    paths = [".".join(pieces[: i + 1]) for i in range(len(pieces))]
    # PEFT compares with `endswith`, without a dot boundary.
    return name if any(path.endswith(m) for path in paths for m in saved_modules(config)) else None


def _low_rank(module: str, found: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> LowRank:
    """Pairs, checks and scales the factors of one module. **Raises:** `ValueError` naming it."""
    names = [part for part in found if part.startswith("lora_")]
    infix = "embedding_" if any(name.startswith("lora_embedding") for name in names) else ""
    pair = (f"lora_{infix}A", f"lora_{infix}B")
    for name in pair:
        if name not in found:
            raise ValueError(f"{module} has {', '.join(names)} but no {name}")
    a, b = found[pair[0]], found[pair[1]]
    kind = "embedding" if infix else "conv" if a.ndim > 2 else "linear"
    if infix and ("lora_A" in found or "lora_B" in found):
        raise ValueError(f"{module} mixes lora_embedding_* with lora_* keys")
    shapes = f"A {a.shape} and B {b.shape}"
    if not 2 <= a.ndim <= (2 if infix else 5) or a.ndim != b.ndim or b.shape[2:] != (1,) * (a.ndim - 2):
        raise ValueError(f"{module}: {shapes} do not have the shapes of LoRA factors")
    rank, inner = a.shape[0], b.shape[1]
    if 0 in a.shape or 0 in b.shape:
        raise ValueError(f"{module}: {shapes} are empty")
    grouped = kind == "conv" and rank % inner == 0 and b.shape[0] % (rank // inner) == 0
    if rank != inner and not grouped:
        raise ValueError(f"{module}: the ranks of {shapes} do not agree")
    ranks = pattern_values(config["rank_pattern"], module) or [config["r"]]
    if rank not in ranks and not config.get("ensure_weight_tying"):
        raise ValueError(f"{module}: {shapes} have rank {rank}, but the configuration says {ranks[0]}")
    alpha = float([*pattern_values(config["alpha_pattern"], module), config["lora_alpha"]][0])
    bias = found.get("lora_B.bias")
    if config.get("lora_bias") and bias is None:
        raise ValueError(f"{module} has no lora_B.bias although lora_bias is true")
    if bias is not None and bias.shape != b.shape[:1]:
        raise ValueError(f"{module}: lora_B.bias has shape {bias.shape}, but B {b.shape}")
    return LowRank(kind, a, b, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), bias)
