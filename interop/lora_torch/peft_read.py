"""Strict reading of a PEFT directory, without torch.

PEFT drops what it does not know, lets a stray key overwrite a base tensor, and gives base outputs when nothing
fits. Here every key must have a role under the configuration beside it, or the one error names all that have none.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.peft_config import TASK_HEADS, check_is_lora, refused_fields, unknown_fields, without_init
from lora_jax.peft_matching import bad_patterns, is_target, pattern_values

from .arrays import convert, same_bits
from .peft_keys import PREFIX

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B"}
# Endings of methods that are not implemented, and how to call them.
_METHODS = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_B.bias": "`lora_bias`",
    ".trainable_tokens_delta": "trainable tokens",
    ".ia3_l": "IA3",
    "prompt_embeddings": "prompt learning",
}
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


@dataclass
class AdapterFile:
    """A directory's parts by role.

    **Fields:** `config`, as stored; `pairs`, `{module: {"A": array, "B": array}}` with `.base_layer` left in nested
    names; `embeddings`, which of these have embedding keys; `full`, whole tensors of `modules_to_save`; `bases`,
    `{module: weight}` that PEFT stores beside a targeted embedding; `strays`, whole tensors that the
    configuration does not name; `problems` found so far.
    """

    directory: Path
    config: dict[str, Any]
    pairs: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    full: dict[str, np.ndarray] = field(default_factory=dict)
    bases: dict[str, np.ndarray] = field(default_factory=dict)
    strays: dict[str, np.ndarray] = field(default_factory=dict)
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
    sort(Path(directory), config, tensors).raise_if_any()
    return config, tensors


def read_sorted(directory: str | Path) -> AdapterFile:
    """As `read_peft`, but parts by role, with `problems` collected rather than raised."""
    config, tensors = _files(Path(directory))
    return sort(Path(directory), config, tensors)


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed `adapter_config.json` of a LoRA adapter."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        below = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG_FILE}")) if directory.is_dir() else []
        hint = f"; its folders {', '.join(below)} are adapters, pass one of them" if below else ""
        raise FileNotFoundError(f"{directory} is not a PEFT adapter: there is no {CONFIG_FILE}{hint}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object of settings.")
    try:
        check_is_lora(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_types(path, config)
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which no key stands twice: readers differ in which of the two they take."""
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"it has {', '.join(map(repr, twice))} twice")
    return out


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    problems = []
    numbers = [("r", config.get("r", 8)), ("lora_alpha", config.get("lora_alpha", 8))]
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            problems.append(f"`{key}` must be an object, got {value!r}")
        else:
            numbers += [(f"{key}[{k!r}]", v) for k, v in (value or {}).items()]
    for name, value in numbers:
        whole = name == "r" or name.startswith("rank")
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not _is_finite(value) or (whole and value < 1):
            problems.append(f"`{name}` must be a {'positive whole' if whole else 'finite'} number, got {value!r}")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern"):
        value = config.get(key)
        plain = isinstance(value, list) and all(isinstance(x, str) for x in value)
        text = isinstance(value, str) and key not in ("modules_to_save", "target_parameters")
        if value is not None and not plain and not text:
            problems.append(f"`{key}` must be a list of names, got {value!r}")
    if not isinstance(config.get("use_rslora") or False, bool):
        problems.append(f"`use_rslora` must be true or false, got {config['use_rslora']!r}")
    layers = config.get("layers_to_transform")
    listed = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        problems.append(f"`layers_to_transform` must be whole numbers, got {layers!r}")
    if not problems:
        problems = bad_patterns(config)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")


def _files(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = read_config(directory)
    if (directory / TENSOR_FILE).is_file():
        return config, _read_safetensors(directory / TENSOR_FILE)
    if (directory / PICKLE_FILE).is_file():
        return config, _read_pickle(directory / PICKLE_FILE)
    raise FileNotFoundError(f"{directory} holds no {TENSOR_FILE}.")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # The library checks the header's length and every offset against the file before a tensor is made.
    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}
            if wrong := {k: v for k, v in kinds.items() if v not in FLOATS}:
                listed = ", ".join(f"{k} ({v})" for k, v in wrong.items())
                raise ValueError(f"{path}: factors are {', '.join(FLOATS)}; not so {listed}.")
            return {key: np.asarray(file.get_tensor(key), FLOATS[kinds[key]]) for key in kinds}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is no safetensors file: {error}.") from error


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


def sort(directory: Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> AdapterFile:
    """Gives each key its role; whatever has none is in `problems`."""
    out = AdapterFile(directory, config)
    out.problems += refused_fields({k: v for k, v in config.items() if k != "eva_config"})
    out.problems += [
        f"`{key}={config[key]!r}` is unknown here and may change what the adapter computes: if it does not, remove it "
        f"from {CONFIG_FILE}"
        for key in unknown_fields(config)
        if config[key]
    ]
    try:
        without_init(config)
    except ValueError as error:
        out.problems.append(str(error))
    if not tensors:
        out.problems.append(f"{TENSOR_FILE} holds no tensors")
    for key, value in tensors.items():
        if not _KEY.fullmatch(key):
            out.problems.append(f"{key!r} is no name of a tensor")
        elif not key.startswith(PREFIX):
            out.problems.append(f"{key} does not start with `{PREFIX}`; PEFT would ignore it")
        elif method := next((m for end, m in _METHODS.items() if key.endswith(end)), None):
            out.problems.append(f"{key} belongs to {method}, which is not implemented")
        elif ending := next((e for e in _PARTS if key.endswith(e)), None):
            module = key.removeprefix(PREFIX).removesuffix(ending)
            pair = out.pairs.setdefault(module, {})
            if pair and ("embedding" in ending) != (module in out.embeddings):
                out.problems.append(f"{key}: {module} has factors of an embedding and of a linear layer")
            pair[_PARTS[ending]] = value
            if "embedding" in ending:
                out.embeddings.add(module)
        else:
            _whole_tensor(key.removeprefix(PREFIX), value, out)
    _tied_copies(out)
    for module, pair in out.pairs.items():
        _check_pair(module, pair, out)
    for module in out.bases:
        if module not in out.pairs:
            out.problems.append(f"{PREFIX}{module}.base_layer.weight would overwrite the base: {module} has no factors")
    return out


def _whole_tensor(name: str, value: np.ndarray, out: AdapterFile) -> None:
    if name.endswith(".base_layer.weight"):
        out.bases[name.removesuffix(".base_layer.weight")] = value
        return
    entries = [*(out.config.get("modules_to_save") or ()), *TASK_HEADS.get(str(out.config.get("task_type") or ""), ())]
    parts = name.split(".")[:-1]
    owners = [".".join(parts[: n + 1]) for n in range(len(parts))]
    if copied := [owner for owner in owners if owner.endswith(tuple(entries))]:
        out.full[name] = value
        if len(copied) > 1:
            out.problems.append(
                f"`modules_to_save` names {copied[0]} and {copied[1]} in it: PEFT trained two copies and stored one"
            )
    else:
        out.strays[name] = value


def _tied_copies(out: AdapterFile) -> None:
    """With `ensure_weight_tying` PEFT also saves the head that shares a copied table, and does not list it."""
    copies = list(out.full.values()) if out.config.get("ensure_weight_tying") else []
    for name, value in out.strays.items():
        if any(same_bits(value, copy) for copy in copies):
            out.full[name] = value
        else:
            out.problems.append(
                f"{PREFIX}{name} {value.shape} would overwrite a base tensor: it is no factor, and `modules_to_save` "
                "does not name its module"
            )


def _check_pair(module: str, pair: Mapping[str, np.ndarray], out: AdapterFile) -> None:
    if missing := {"A", "B"} - set(pair):
        out.problems.append(f"{PREFIX}{module} has lora_{'BA'['B' in missing]} but no lora_{missing.pop()}")
        return
    a, b = pair["A"], pair["B"]
    shapes = f"{module}: lora_A {a.shape}, lora_B {b.shape}"
    if a.ndim < 2 or a.ndim != b.ndim or 0 in (*a.shape, *b.shape) or any(n != 1 for n in b.shape[2:]):
        out.problems.append(f"{shapes} are no factors")
        return
    grouped = a.ndim > 2 and a.shape[0] % b.shape[1] == 0
    if a.shape[0] != b.shape[1] and not grouped:
        out.problems.append(f"{shapes} do not agree on a rank; are they transposed?")
        return
    bare = module.replace(".base_layer", "")
    owners = [name.rpartition(".")[0] for name in out.config.get("target_parameters") or ()]
    if any(bare == owner or bare.endswith(f".{owner}") for owner in owners):
        return  # its rank is that of all experts together
    if not is_target(out.config, module) and not out.config.get("ensure_weight_tying"):
        out.problems.append(f"{module} has factors, but the configuration does not target it; PEFT would drop them")
    try:
        scaling(out.config, module, a.shape[0])
    except ValueError as error:
        out.problems.append(str(error))


def scaling(config: Mapping[str, Any], name: str, rank: int) -> tuple[float, float]:
    """`(alpha, scale)` of the module `name`, whose tensors have rank `rank`.

    PEFT takes the first matching pattern, in an order that its own sorted JSON changes; so patterns only confirm
    the rank of the tensors, and alphas must not contradict one another. What `target_parameters` names, a linear
    layer's weight too, is matched under the parameter's name.

    **Raises:** `ValueError` if no rank of the configuration is `rank`, or if alpha is ambiguous.
    """
    weight = f"{name}.weight"
    if any(weight == entry or weight.endswith(f".{entry}") for entry in config.get("target_parameters") or ()):
        name = weight
    ranks = pattern_values(config.get("rank_pattern"), name) or [config.get("r", 8)]
    if rank not in ranks:
        said = " or ".join(map(str, dict.fromkeys(ranks)))
        raise ValueError(
            f"{name}: the tensors have rank {rank}, the configuration says {said}, so its scale is unknown"
        )
    alphas = list(dict.fromkeys(pattern_values(config.get("alpha_pattern"), name))) or [config.get("lora_alpha", 8)]
    if len(alphas) > 1:
        raise ValueError(
            f"{name}: several keys of `alpha_pattern` match, with alphas {', '.join(map(str, alphas))}; which one PEFT "
            "meant is lost when it sorts the file. Leave the right one"
        )
    return float(alphas[0]), float(alphas[0]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
