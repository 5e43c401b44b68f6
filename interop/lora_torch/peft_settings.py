"""`adapter_config.json` of a PEFT LoRA adapter: reading it, judging its values, and what it says of one module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.config import BIASES, check_ranges
from lora_jax.peft_config import check_is_lora, unknown_fields
from lora_jax.peft_matching import bad_patterns, pattern_values

from .files import read_json

CONFIG_FILE = "adapter_config.json"
# A string such as "false" would count as true.
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "use_qalora", "ensure_weight_tying", "fan_in_fan_out")


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed `adapter_config.json` of a LoRA adapter.

    **Raises:** `FileNotFoundError` if there is none; `ValueError` for anything but settings of a LoRA adapter, each of
    the type that PEFT takes.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        below = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG_FILE}")) if directory.is_dir() else []
        hint = f"; its folders {', '.join(below)} are adapters, pass one of them" if below else ""
        hint = hint or ("" if directory.is_dir() else ", it is not a directory")
        raise FileNotFoundError(f"{directory} is not a PEFT adapter: there is no {CONFIG_FILE}{hint}.")
    config = read_json(path)
    try:
        check_is_lora(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_types(path, config)
    return config


def unknown_settings(config: Mapping[str, Any]) -> list[str]:
    """The settings that are on and that PEFT 0.21 does not have, one description each."""
    return [
        f"`{key}={config[key]!r}` is unknown here and may change what the adapter computes: if it does not, remove it "
        f"from {CONFIG_FILE}"
        for key in unknown_fields(config)
        if config[key]
    ]


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    problems = []
    numbers = [("r", config.get("r", 8)), ("lora_alpha", config.get("lora_alpha", 8))]
    numbers.append(("qalora_group_size", config.get("qalora_group_size", 16)))
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            problems.append(f"`{key}` must be an object, got {value!r}")
        else:
            numbers += [(f"{key}[{k!r}]", v) for k, v in (value or {}).items()]
    for name, value in numbers:
        whole = name in ("r", "qalora_group_size") or name.startswith("rank")
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not _is_finite(value) or (whole and value < 1):
            problems.append(f"`{name}` must be a {'positive whole' if whole else 'finite'} number, got {value!r}")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern"):
        value = config.get(key)
        plain = isinstance(value, list) and all(isinstance(x, str) for x in value)
        text = isinstance(value, str) and key not in ("modules_to_save", "target_parameters")
        if value is not None and not plain and not text:
            problems.append(f"`{key}` must be a list of names, got {value!r}")
    for key in _FLAGS:
        if not isinstance(config.get(key) or False, bool):
            problems.append(f"`{key}` must be true or false, got {config[key]!r}")
    layers = config.get("layers_to_transform")
    listed = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        problems.append(f"`layers_to_transform` must be whole numbers, got {layers!r}")
    if (bias := config.get("bias") or "none") not in BIASES:
        problems.append(f"`bias` must be one of {', '.join(BIASES)}, got {bias!r}")
    try:
        check_ranges(config.get("layer_replication"))
    except ValueError as error:
        problems.append(str(error).removesuffix("."))
    rows = config.get("trainable_token_indices")
    for listed in rows.values() if isinstance(rows, dict) else [[] if rows is None else rows]:
        plain = isinstance(listed, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in listed)
        if not plain or min(listed, default=0) < 0:
            problems.append(f"`trainable_token_indices` must be lists of whole numbers, 0 or more, got {listed!r}")
    if not problems:
        problems = bad_patterns(config)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")


def group_of(config: Mapping[str, Any]) -> int:
    """How many inputs one row of lora_A stands for: QALoRA's group size, else 1."""
    return config.get("qalora_group_size", 16) if config.get("use_qalora") else 1


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
