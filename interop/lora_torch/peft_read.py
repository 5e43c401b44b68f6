"""Strict reading of a PEFT directory, without torch.

PEFT drops what it does not know, lets a stray key overwrite a base tensor, and gives base outputs when nothing
fits. Here every key must have a role under the configuration beside it, or the one error names all that have none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.peft_config import refused_fields, without_init
from lora_jax.peft_matching import is_target, saved_modules
from lora_jax.sites import LORA_BIAS, MAGNITUDE

from .arrays import convert, same_bits
from .files import read_floats
from .peft_keys import PREFIX
from .peft_settings import read_config, scaling, unknown_settings

TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

# Called so, but these are the rows themselves.
DELTA = "trainable_tokens_delta"
_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B"}
# Endings of methods on top of LoRA: what they are called here and by users, and the setting that switches them on.
_EXTRAS = {
    ".lora_magnitude_vector": (MAGNITUDE, "DoRA", "use_dora"),
    ".lora_magnitude_vector.weight": (MAGNITUDE, "DoRA", "use_dora"),  # as transformers reads it
    ".lora_B.bias": (LORA_BIAS, "`lora_bias`", "lora_bias"),
    f".token_adapter.{DELTA}": (DELTA, "trainable tokens", "trainable_token_indices"),
}
# Endings that no LoRA file has.
_FOREIGN = {".ia3_l": "IA3", "prompt_embeddings": "prompt learning"}
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


@dataclass
class AdapterFile:
    """A directory's parts by role.

    **Fields:** `config`, as stored; `pairs`, `{module: {"A": array, "B": array}}` with `.base_layer` left in nested
    names; `embeddings`, which of these have embedding keys; `full`, whole tensors by name, of `modules_to_save` and
    biases trained beside the factors; `bases`, `{module: weight}` that PEFT stores beside a targeted embedding;
    `strays`, whole tensors that the configuration does not name; `extras`, `{module: {name: array}}` of DoRA,
    `lora_bias` and trained token rows; `problems` found so far.
    """

    directory: Path
    config: dict[str, Any]
    pairs: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    full: dict[str, np.ndarray] = field(default_factory=dict)
    bases: dict[str, np.ndarray] = field(default_factory=dict)
    strays: dict[str, np.ndarray] = field(default_factory=dict)
    extras: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def raise_if_any(self) -> None:
        """Raises the one `ValueError` that lists all problems."""
        if self.problems:
            lines = "\n".join(f"  {p}" for p in dict.fromkeys(self.problems))
            raise ValueError(f"{self.directory} is not accepted; nothing was loaded:\n{lines}")


def read_peft(directory: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors, by key, of a PEFT LoRA directory whose every key is accounted for.

    A model is not needed, so modules it lacks and factors it has no shape for go unnoticed here; `load_peft` sees
    them. `adapter_model.bin` is read only if there is no safetensors file, with torch, and by
    `torch.load(weights_only=True)`, which executes nothing.

    **Raises:** `FileNotFoundError` without the two files; `ValueError` for anything else that is wrong: not JSON, not
    LoRA, a damaged file, and in one error every key that is unknown, unpaired, misshapen, not floating point, that
    would overwrite a base tensor, or that PEFT would drop since the configuration does not name its module.
    """
    config, tensors = _files(Path(directory))
    file = _sort(Path(directory), config, tensors)
    _only_lora(file)
    file.raise_if_any()
    return config, tensors


def read_sorted(directory: str | Path) -> AdapterFile:
    """As `read_peft`, but parts by role, with `problems` collected rather than raised."""
    file = read_described(directory)
    _only_lora(file)
    return file


def read_described(directory: str | Path) -> AdapterFile:
    """As `read_sorted`, but methods that cannot be applied here are taken where the configuration states them.

    For looking at a file. Whoever computes with it must refuse `extras` and settings it does not know.
    """
    return _sort(Path(directory), *_files(Path(directory)))


def _only_lora(file: AdapterFile) -> None:
    """Notes everything that `lora_jax` does not apply."""
    try:
        file.problems += refused_fields(without_init(file.config))
    except ValueError as error:
        file.problems += [*refused_fields(file.config), str(error).removesuffix(".")]
    file.problems += unknown_settings(file.config)
    if file.config.get("use_dora") and file.config.get("lora_bias"):
        file.problems.append("`use_dora` and `lora_bias` exclude each other")


def _files(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = read_config(directory)
    if (directory / TENSOR_FILE).is_file():
        return config, read_floats(directory / TENSOR_FILE)
    if (directory / PICKLE_FILE).is_file():
        return config, _read_pickle(directory / PICKLE_FILE)
    raise FileNotFoundError(f"{directory} holds no {TENSOR_FILE}.")


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} is a pickle, read only by torch's restricted loader: install torch, or save the adapter as "
            f"{TENSOR_FILE}."
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged or hostile file fails in any way whatever
        raise ValueError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}); it is never unpickled otherwise. "
            f"Save the adapter as {TENSOR_FILE}."
        ) from error
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) and v.is_floating_point() for k, v in found.items()
    ):
        raise ValueError(f"{path} holds other things than named floating-point tensors.")
    return {key: convert(value, "numpy") for key, value in found.items()}


def _sort(directory: Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> AdapterFile:
    """Gives each key its role; whatever has none is in `problems`."""
    out = AdapterFile(directory, config)
    if not tensors:
        out.problems.append(f"{TENSOR_FILE} holds no tensors")
    whole: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if not _KEY.fullmatch(key):
            out.problems.append(f"{key!r} is no name of a tensor")
        elif name == key:
            out.problems.append(f"{key} does not start with `{PREFIX}`; PEFT would ignore it")
        elif method := next((m for end, m in _FOREIGN.items() if key.endswith(end)), None):
            out.problems.append(f"{key} belongs to {method}, which is not implemented")
        elif ending := next((e for e in _EXTRAS if key.endswith(e)), None):
            _extra(name.removesuffix(ending), ending, value, out)
        elif ending := next((e for e in _PARTS if key.endswith(e)), None):
            module = name.removesuffix(ending)
            pair = out.pairs.setdefault(module, {})
            if pair and ("embedding" in ending) != (module in out.embeddings):
                out.problems.append(f"{key}: {module} has factors of an embedding and of a linear layer")
            pair[_PARTS[ending]] = value
            if "embedding" in ending:
                out.embeddings.add(module)
        else:
            whole[name] = value
    _whole_tensors(whole, out)
    for module, pair in out.pairs.items():
        _check_pair(module, pair, out)
    for module, extras in out.extras.items():
        if module not in out.pairs and (needy := sorted(extras.keys() - {DELTA})):
            out.problems.append(f"{PREFIX}{module} has {', '.join(needy)} but no factors")
    for module in out.bases:
        if module not in out.pairs:
            out.problems.append(f"{PREFIX}{module}.base_layer.weight would overwrite the base: {module} has no factors")
    return out


def _extra(module: str, ending: str, value: np.ndarray, out: AdapterFile) -> None:
    name, method, setting = _EXTRAS[ending]
    extras = out.extras.setdefault(module, {})
    if name in extras and not same_bits(extras[name], value):
        out.problems.append(f"{PREFIX}{module}{ending} is not the same as the {name} of another spelling")
    extras[name] = value
    if not out.config.get(setting):
        out.problems.append(f"{PREFIX}{module}{ending} belongs to {method}, but the configuration has no `{setting}`")


def _whole_tensors(whole: Mapping[str, np.ndarray], out: AdapterFile) -> None:
    bias, entries = out.config.get("bias") or "none", tuple(saved_modules(out.config))
    for name, value in whole.items():
        if bias == "all" and _repeats(name, value, whole):
            continue
        module, _, parameter = name.rpartition(".")
        adapted = module.removesuffix(".base_layer")
        parts = module.split(".")
        owners = [".".join(parts[: n + 1]) for n in range(len(parts))]
        # PEFT compares with `endswith`, without a dot boundary.
        copied = [owner for owner in owners if owner.endswith(entries)]
        if adapted != module and parameter == "weight":
            out.bases[adapted] = value
        elif adapted != module and parameter == "bias" and bias in ("all", "lora_only") and adapted in out.pairs:
            out.full[f"{adapted}.bias"] = value
        elif copied or (parameter == "bias" and bias == "all"):
            out.full[name] = value
        else:
            out.strays[name] = value
        if len(copied) > 1 and name in out.full:
            out.problems.append(
                f"`modules_to_save` names {copied[0]} and {copied[1]} in it: PEFT trained two copies and stored one"
            )
    _tied_copies(out)


def _repeats(name: str, value: np.ndarray, whole: Mapping[str, np.ndarray]) -> bool:
    """Whether this is a bias that PEFT stores again with `bias="all"`: of a copied module, and of what it copied."""
    for inner in (".modules_to_save.bias", ".original_module.bias"):
        copy = whole.get(f"{name.removesuffix(inner)}.bias")
        if name.endswith(inner) and copy is not None:
            return inner.startswith(".original") or same_bits(copy, value)
    return False


def _tied_copies(out: AdapterFile) -> None:
    """With `ensure_weight_tying` PEFT also saves the head that shares a copied table, and does not list it."""
    copies = list(out.full.values()) if out.config.get("ensure_weight_tying") else []
    for name, value in out.strays.items():
        if any(same_bits(value, copy) for copy in copies):
            out.full[name] = value
        else:
            out.problems.append(
                f"{PREFIX}{name} {value.shape} would overwrite a base tensor: it is no factor, and neither "
                "`modules_to_save` nor `bias` gives it a role"
            )


def _check_pair(module: str, pair: Mapping[str, np.ndarray], out: AdapterFile) -> None:
    if missing := {"A", "B"} - set(pair):
        out.problems.append(f"{PREFIX}{module} has lora_{'BA'['B' in missing]} but no lora_{missing.pop()}")
        return
    a, b = pair["A"], pair["B"]
    shapes = f"{module}: lora_A {a.shape}, lora_B {b.shape}"
    most = 2 if module in out.embeddings else 5
    if not 2 <= a.ndim <= most or a.ndim != b.ndim or 0 in (*a.shape, *b.shape) or any(n != 1 for n in b.shape[2:]):
        out.problems.append(f"{shapes} are no factors")
        return
    groups = a.shape[0] // b.shape[1]
    grouped = a.ndim > 2 and groups > 0 and a.shape[0] % b.shape[1] == 0 and b.shape[0] % groups == 0
    if a.shape[0] != b.shape[1] and not grouped:
        out.problems.append(f"{shapes} do not agree on a rank; are they transposed?")
        return
    bare = module.replace(".base_layer", "")
    owners = [name.rpartition(".")[0] for name in out.config.get("target_parameters") or ()]
    if any(bare == owner or bare.endswith(f".{owner}") for owner in owners):
        return  # its rank is that of all experts together
    # With `ensure_weight_tying` PEFT adapts the tied head too and leaves it out of `target_modules`.
    if not is_target(out.config, module) and not out.config.get("ensure_weight_tying"):
        out.problems.append(f"{module} has factors, but the configuration does not target it; PEFT would drop them")
    _check_extras(module, b, out)
    try:
        scaling(out.config, module, a.shape[0])
    except ValueError as error:
        out.problems.append(str(error))


def _check_extras(module: str, b: np.ndarray, out: AdapterFile) -> None:
    extras = out.extras.get(module, {})
    for name, setting in ((MAGNITUDE, "use_dora"), (LORA_BIAS, "lora_bias")):
        if out.config.get(setting) and name not in extras:
            out.problems.append(f"{module} has no {name} although `{setting}` is true")
    for name, value in extras.items():
        if name == MAGNITUDE and b.ndim > 2 and value.shape[:1] == (1,) and value.ndim == b.ndim:
            value = extras[name] = value.reshape(-1)  # (1, out, 1, …) of a convolution
        if name != DELTA and value.shape != b.shape[:1]:
            out.problems.append(f"{module}: {name} is {value.shape}, but lora_B {b.shape}")
