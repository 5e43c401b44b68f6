"""Which parameters a configuration names.

A parameter answers to four names: its own dotted path, its module's (the path without the parameter's name), and
both again with `layers_0` written as PyTorch writes it, `layers.0`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from lora_jax.config import LoRAConfig

ALL_LINEAR = "all-linear"
ROUTERS = frozenset({"router", "gate", "gating_network", "router_weights"})
HEADS = frozenset({"lm_head", "score", "classifier", "qa_outputs", "embed_out"})


def names_of(path: Sequence[str]) -> tuple[str, ...]:
    """Every name a parameter answers to, its module's first."""
    own, module = ".".join(path), ".".join(path[:-1])
    plain = [n for n in (module, own) if n]
    return tuple(dict.fromkeys([*plain, *(re.sub(r"_(\d+)(?=\.|$)", r".\1", n) for n in plain)]))


def is_wildcard(entry: str) -> bool:
    return any(c in entry for c in "*?[")


class Patterns:
    """A list of names and wildcards, or one regular expression; remembers which entries matched."""

    def __init__(self, what: str | Sequence[str] | None):
        self.is_text = isinstance(what, str)
        self.entries: tuple[str, ...] = () if what is None else (what,) if isinstance(what, str) else tuple(what)
        self._regex = _compiled(what) if isinstance(what, str) and what.lower() != ALL_LINEAR else None

    @property
    def all_linear(self) -> bool:
        return self.is_text and self.entries[0].lower() == ALL_LINEAR

    def match(self, path: Sequence[str]) -> tuple[str, bool] | None:
        """`(entry, exact)` for the first entry that names this parameter; `exact` if it is the whole name."""
        names = names_of(path)
        if self.is_text:
            if self.all_linear or self._regex is None:
                return None
            return (self.entries[0], True) if any(self._regex.fullmatch(n) for n in names) else None
        for entry in self.entries:
            if entry in names:
                return entry, True
            if is_wildcard(entry):
                if any(fnmatch.fnmatchcase(n, entry) for n in names):
                    return entry, True
            elif any(n.endswith("." + entry) for n in names):
                return entry, False
        return None

    def names_literally(self, path: Sequence[str]) -> bool:
        """Whether an entry spells out the last part of this parameter's or its module's name."""
        parts = set(path[-2:])
        return any(parts & set(re.split(r"[^\w]+", entry)) for entry in self.entries)


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error:
        if is_wildcard(text):
            return re.compile(fnmatch.translate(text))
        raise ValueError(
            f"`target_modules={text!r}` is neither a regular expression nor a wildcard; to name modules, "
            f"write a list: [{text!r}]."
        ) from None


def in_layers(path: Sequence[str], config: LoRAConfig) -> bool:
    """PEFT's layer filter: the first layer index in the name must be one of `layers_to_transform`."""
    if not config.layers_to_transform:
        return True
    lists = config.layers_pattern
    pattern = rf"(?:^|.*?\.)(?:{'|'.join(map(re.escape, lists))})\.(\d+)\." if lists else r".*?\.[^.]*\.(\d+)\."
    for name in names_of(path):
        if found := re.match(pattern, name + "."):
            return int(found.group(1)) in tuple(config.layers_to_transform)  # type: ignore[arg-type]
    return False


def saved_by(path: Sequence[str], entries: Iterable[str]) -> str | None:
    """The entry of `modules_to_save` under which this parameter lives, on whole name parts."""
    for entry in entries:
        if any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", name) for name in names_of(path)):
            return entry
    return None


def from_pattern(path: Sequence[str], pattern: dict[str, float]) -> str | None:
    """The first key of `rank_pattern`/`alpha_pattern` that matches the end of this parameter's name."""
    for key in pattern:
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names_of(path)):
            return key
    return None


def nearest(entry: str, paths: Iterable[Sequence[str]], n: int = 3) -> str:
    """Names close to one that matched nothing, for error messages."""
    last = re.split(r"[.*]", entry)[-1] or entry
    modules = sorted({".".join(p[:-1]) or ".".join(p) for p in paths})
    leaves = sorted({m.split(".")[-1] for m in modules})
    close = difflib.get_close_matches(last, leaves, n=n, cutoff=0.5)
    found = [m for c in close for m in modules if m.split(".")[-1] == c]
    shown = list(dict.fromkeys(close + found[:n])) or leaves[: 2 * n]
    return ", ".join(f"`{s}`" for s in shown)
