"""Which modules of a torch model get an adapter, by wildcards over their whole dotted names.

The rules are those of NeMo Automodel, which differ from PEFT's: a pattern is matched against the whole name, so
`q_proj` is the module `q_proj` at the root and not `layers.0.q_proj`; write `*q_proj` or `*.q_proj`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

logger = logging.getLogger(__name__)

DEFAULT_TARGETS = ["*_proj"]


def wildcard_match(pattern: str, key: str | None) -> bool:
    """Whether `pattern` matches the whole of `key`; a `key` of None is matched by nothing.

    `*` is any text, dots included. The rest is a regular expression (`.` is any character, `.*` stays what it is, but
    after a number keeps its dot: `*.layers.1.*` is layer 1 and what is in it, not layer 10).

    **Raises:** `ValueError` if `pattern` is not a regular expression.

    >>> wildcard_match("*.layers.0.*.q_proj", "model.layers.0.self_attn.q_proj")
    True
    >>> wildcard_match("*.layers.0.*.q_proj", "model.layers.1.self_attn.q_proj")
    False
    """
    if key is None:
        return False
    try:
        parted = re.sub(r"((?:^|\.)\d+)\.\*", r"\1(?:\\..*)?", pattern)
        return re.fullmatch(re.sub(r"(?<!\.)\*", ".*", parted), key) is not None
    except re.error as error:
        raise ValueError(
            f"pattern {pattern!r} is not a regular expression ({error}): `*` stands for any text, and `+`, `(`, `[` "
            "have to be escaped with a backslash"
        ) from None


@dataclass
class ModuleMatcher:
    """The modules that a configuration adapts.

    **Fields:**

    - `target_modules`: names or wildcard patterns; a single string is a list of one.
    - `exclude_modules`: every linear layer but those that match.
    - `match_all_linear`: every linear layer, the output head included.

    Exactly one of them; with none, `*_proj`, and the log says so.

    **Raises:** `ValueError` for two of them, or a pattern that is no regular expression; `TypeError` for other types.
    """

    target_modules: list[str] = field(default_factory=list)
    exclude_modules: list[str] = field(default_factory=list)
    match_all_linear: bool = False

    def __post_init__(self) -> None:
        self.target_modules = _patterns("target_modules", self.target_modules)
        self.exclude_modules = _patterns("exclude_modules", self.exclude_modules)
        if self.target_modules and self.exclude_modules:
            raise ValueError(
                f"target_modules={self.target_modules} and exclude_modules={self.exclude_modules} contradict each "
                "other: give the modules to adapt, or those to leave out"
            )
        if self.match_all_linear and (self.target_modules or self.exclude_modules):
            raise ValueError(
                "match_all_linear=True adapts every linear layer: leave target_modules and exclude_modules empty, or "
                "match_all_linear out"
            )
        if not (self.match_all_linear or self.target_modules or self.exclude_modules):
            logger.warning("no modules were named for LoRA: adapting target_modules=%s", DEFAULT_TARGETS)
            self.target_modules = list(DEFAULT_TARGETS)

    def match(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> bool:
        """Whether module `m`, called `name` below `prefix`, is meant.

        A target means a module of any class. The other two mean only `nn.Linear`.
        """
        full_name = f"{prefix}.{name}" if prefix else name
        if self.target_modules:
            return any(self.matches(pattern, name, full_name) for pattern in self.target_modules)
        excluded = any(self.matches(pattern, name, full_name) for pattern in self.exclude_modules)
        return isinstance(m, nn.Linear) and not excluded

    @staticmethod
    def matches(pattern: str, name: str | None, full_name: str | None) -> bool:
        return name == pattern or wildcard_match(pattern, full_name)


def _patterns(option: str, value: list[str] | str | None) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, Sequence):
        raise TypeError(f"{option}={value!r}: write a list of names or patterns")
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"{option} takes names or patterns, got {pattern!r}")
        wildcard_match(pattern, "")
    return patterns
