"""Which parameters a configuration names.

A parameter answers to four names: its own dotted path, its module's (the path without the parameter's name), and
both again with `layers_0` written as PyTorch writes it, `layers.0`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from lora_jax.config import NOT_A_REGEX, LoRAConfig

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

    def matches(self, path: Sequence[str]) -> list[tuple[str, bool]]:
        """`(entry, exact)` for every entry that names this parameter.

        `exact`: the entry spells out the whole name, or it is the regular expression; no layer filter applies.
        """
        names = names_of(path)
        if self.is_text:
            hit = self._regex is not None and any(self._regex.fullmatch(n) for n in names)
            return [(self.entries[0], True)] if hit else []
        return [(entry, entry in names) for entry in self.entries if _names_one_of(entry, names)]

    def match(self, path: Sequence[str]) -> tuple[str, bool] | None:
        """The entry that names this parameter, as `matches` gives it: an exact one if there is any."""
        return min(self.matches(path), key=lambda found: not found[1], default=None)

    def names_literally(self, path: Sequence[str]) -> bool:
        """Whether an entry spells out the last part of this parameter's or its module's name."""
        parts = set(path[-2:])
        return any(parts & set(re.split(r"[^\w]+", entry)) for entry in self.entries)


def _names_one_of(entry: str, names: Sequence[str]) -> bool:
    if is_wildcard(entry):
        return any(fnmatch.fnmatchcase(n, entry) for n in names)
    return any(n == entry or n.endswith("." + entry) for n in names)


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except NOT_A_REGEX:
        if is_wildcard(text):
            return re.compile(fnmatch.translate(text))
        shown = repr(text) if len(text) < 80 else f"{text[:76]!r}..."
        raise ValueError(
            f"the target {shown} is neither a regular expression nor a wildcard; to name modules, write a list: "
            f"[{shown}]."
        ) from None


def layer_of(path: Sequence[str], config: LoRAConfig) -> tuple[int, str | None] | None:
    """The layer that a parameter lies in, and the entry of `layers_pattern` that says so, if there are any.

    The layer is the first number that is a part of the name, `7` in `model.layers.7.q` and in `layers_7.q`, or the
    first one after an entry of `layers_pattern`.

    **Source:** PEFT 0.21, which sees no layer in `layers.7.q`, where nothing stands before the list. In Flax such
    names are the rule.
    """
    lists: Sequence[str | None] = tuple(config.layers_pattern or ()) or (None,)
    for name in names_of(path):
        for one in lists:
            part = r"[^.]+" if one is None else re.escape(one)
            if found := re.match(rf"(?:.*?\.)??{part}\.(\d+)\.", name + "."):
                return int(found.group(1)), one
    return None


def in_layers(path: Sequence[str], config: LoRAConfig) -> bool:
    """Whether `layers_to_transform` lets this parameter through."""
    layers = config.layers_to_transform
    if layers is None:
        return True
    layer = layer_of(path, config)
    return layer is not None and layer[0] in ((layers,) if isinstance(layers, int) else layers)


def saved_by(path: Sequence[str], entries: Iterable[str]) -> list[str]:
    """The entries of `modules_to_save` under which this parameter lives, on whole name parts."""
    names = names_of(path)
    return [e for e in entries if any(re.match(rf"(^|.*\.){re.escape(e)}($|\..*)", name) for name in names)]


def pattern_keys(path: Sequence[str], pattern: Iterable[str]) -> list[str]:
    """The keys of `rank_pattern`/`alpha_pattern` that match the end of this parameter's name; the first one counts."""
    names = names_of(path)
    return [key for key in pattern if any(re.match(rf"(.*\.)?({key})$", name) for name in names)]


def from_pattern(path: Sequence[str], pattern: Iterable[str]) -> str | None:
    """The key of `rank_pattern`/`alpha_pattern` that counts for this parameter."""
    return next(iter(pattern_keys(path, pattern)), None)


def nearest(entry: str, paths: Iterable[Sequence[str]], n: int = 3) -> str:
    """Names close to one that matched nothing, for error messages."""
    last = re.split(r"[.*]", entry)[-1] or entry
    modules = sorted({".".join(p[:-1]) or ".".join(p) for p in paths})
    leaves = sorted({m.split(".")[-1] for m in modules})
    close = difflib.get_close_matches(last, leaves, n=n, cutoff=0.5)
    found = [m for c in close for m in modules if m.split(".")[-1] == c]
    shown = list(dict.fromkeys(close + found[:n])) or leaves[: 2 * n]
    return ", ".join(f"`{s}`" for s in shown)
