"""PEFT's rules of which module a configuration names, for judging files that PEFT wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_jax.config import NOT_A_REGEX
from lora_jax.peft_config import TASK_HEADS


def is_target(data: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts a module of this dotted name, by `target_modules` and what restricts it.

    True if the targets cannot be told from names: missing (PEFT chooses by model type) or `"all-linear"`.

    **Source:** PEFT 0.21, `check_target_module_exists`: what is saved or excluded goes first, a string is a full
    match, a list matches names or their ends, and only an end is filtered by layer.
    """
    if any(re.match(rf"(^|.*\.){entry}($|\..*)", module) for entry in saved_modules(data)):
        return False
    if _named(data.get("exclude_modules") or (), module):
        return False
    if not names_targets(data):
        return True
    targets = data["target_modules"]
    if not _named(targets, module):
        return False
    return isinstance(targets, str) or module in targets or _in_layers(data, module)


def names_targets(data: Mapping[str, Any]) -> bool:
    """Whether the targets can be told from names of modules alone."""
    targets = data.get("target_modules")
    return targets is not None and not (isinstance(targets, str) and targets.lower() == "all-linear")


def saved_modules(data: Mapping[str, Any]) -> list[str]:
    """The entries of `modules_to_save`, with those that PEFT adds for the task."""
    return [*(data.get("modules_to_save") or ()), *TASK_HEADS.get(str(data.get("task_type") or ""), ())]


def pattern_values(pattern: Mapping[str, Any] | None, name: str) -> list[Any]:
    """The values whose keys match the end of `name`. PEFT takes the first, in an order that saving changes."""
    return [value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)]


def _named(names: Any, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(data: Mapping[str, Any], module: str) -> bool:
    layers, lists = data.get("layers_to_transform"), data.get("layers_pattern") or ()
    if layers is None or layers == []:
        return True
    lists = (lists,) if isinstance(lists, str) else lists
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in lists] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((hit for pattern in patterns if (hit := re.match(pattern, module))), None)
    return found is not None and int(found.group(1)) in ([layers] if isinstance(layers, int) else layers)


def bad_patterns(data: Mapping[str, Any]) -> list[str]:
    """What in `data` PEFT would use as a regular expression and is none, one description each.

    Lists of names become a part of an expression, where a flag such as `(?i)` is an error too.
    """
    texts = [(data[key], "{}") for key in ("target_modules", "exclude_modules") if isinstance(data.get(key), str)]
    lists = data.get("layers_pattern") or ()
    parts = [lists] if isinstance(lists, str) else lists
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern"):
        parts = [*parts, *(data.get(key) or ())]
    texts += [(text, "(.*)({})$") for text in parts]
    out = []
    for text, whole in texts:
        try:
            re.compile(text)
            re.compile(whole.replace("{}", text))
        except NOT_A_REGEX as error:
            out.append(f"{_shortened(text)} is not a regular expression: {error}")
    return out


def _shortened(text: str) -> str:
    return repr(text) if len(text) < 80 else f"{text[:76]!r}..."
