"""`adapter_config.json` of a PEFT LoRA adapter: validation, and PEFT's rules of which module gets what."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# PEFT adds these to modules_to_save by itself.
HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration, with PEFT's defaults for r, lora_alpha and the patterns filled in.

    **Raises:** `ValueError` for anything but a readable configuration of a LoRA adapter.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a PEFT adapter: it has no adapter_config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are both ValueErrors
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object.")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} says peft_type={config.get('peft_type')!r}; only 'LORA' is supported here.")
    # Both change what lora_A and lora_B mean: the numbers shown would be wrong, not merely incomplete.
    for key in ("target_parameters", "use_qalora"):
        if config.get(key):
            raise ValueError(f"{path} uses {key}={config[key]!r}, which is not supported here.")
    config = {"r": 8, "lora_alpha": 8, **config}
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = config.get(key) or {}
    problem = _first_problem(config)
    if problem:
        raise ValueError(f"{path}: {problem}.")
    return config


def _first_problem(config: Mapping[str, Any]) -> str | None:
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config[key], dict):
            return f"{key} must be an object, got {config[key]!r}"
    for key, value in [("r", config["r"]), *config["rank_pattern"].items()]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return f"the rank {key!r} must be a positive integer, got {value!r}"
    for key, value in [("lora_alpha", config["lora_alpha"]), *config["alpha_pattern"].items()]:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return f"the alpha {key!r} must be a finite number, got {value!r}"
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(key)
        if value is None or (isinstance(value, str) and key != "modules_to_save"):
            continue
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            return f"{key} must be a list of strings, got {value!r}"
    layers = config.get("layers_to_transform")
    if layers is not None and not all(isinstance(i, int) for i in (layers if isinstance(layers, list) else [layers])):
        return f"layers_to_transform must be an integer or a list of them, got {layers!r}"
    for regex in _regexes(config):
        try:
            re.compile(regex)
        except re.error as error:
            return f"{regex!r} is not a regular expression: {error}"
    return None


def _regexes(config: Mapping[str, Any]) -> list[str]:
    """Everything in the configuration that PEFT uses as a regular expression."""
    texts = [v for k in ("target_modules", "exclude_modules") if isinstance(v := config.get(k), str)]
    return [
        *texts,
        *config["rank_pattern"],
        *config["alpha_pattern"],
        *saved_modules(config),
        *_layers_pattern(config),
    ]


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """Entries of modules_to_save, with those that PEFT adds for the task."""
    return [*(config.get("modules_to_save") or []), *HEADS_OF_TASK.get(config.get("task_type") or "", ())]


def names_targets(config: Mapping[str, Any]) -> bool:
    """Whether the targets can be told from module names alone: not if absent or `"all-linear"`."""
    targets = config.get("target_modules")
    return bool(targets) and not (isinstance(targets, str) and targets.lower() == "all-linear")


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would adapt a module of this dotted name. Ask only if `names_targets(config)`.

    **Source:** `check_target_module_exists` of PEFT 0.21: saved and excluded modules first, a string is a
    full match, a list matches names or their ends, and only an end match is filtered by layer.
    """
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    if any(re.match(rf"(^|.*\.){entry}($|\..*)", module) for entry in saved_modules(config)):
        return False
    if excluded and _matches(excluded, module):
        return False
    if not _matches(targets, module):
        return False
    return isinstance(targets, str) or module in targets or _in_layers(config, module)


def _matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def _layers_pattern(config: Mapping[str, Any]) -> list[str]:
    patterns = config.get("layers_pattern") or []
    return [patterns] if isinstance(patterns, str) else patterns


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in _layers_pattern(config)] or [r".*?\.[^.]*\.(\d+)\."]
    hits = [hit for pattern in patterns if (hit := re.match(pattern, module))]
    return bool(hits) and int(hits[0].group(1)) in (layers if isinstance(layers, list) else [layers])


def pattern_values(pattern: Mapping[str, Any], module: str) -> list[Any]:
    """The values of a rank or alpha pattern whose keys match the end of `module`, in file order."""
    return [value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)]
