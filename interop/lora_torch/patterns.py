"""Dotted name patterns with wildcards, and the names built from what the wildcards matched.

    *    any characters inside one segment: "layers_*" or a whole segment
    **   whole segments: none or more in front of a dot, one or more at the end

A target holds the same wildcards in the same order and receives what each of them matched, so
`"layers.*.attn.**" -> "model.layers.*.self_attn.**"` moves every parameter below each `attn`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

_WILDCARD = re.compile(r"\*\*\.|\*\*|\*")


@dataclass(frozen=True)
class Pattern:
    """A pattern over dotted names. **Raises** `ValueError` for an empty pattern or `**` glued to other text."""

    text: str

    def __post_init__(self) -> None:
        for segment in self.text.split("."):
            if segment == "" or ("**" in segment and segment != "**"):
                raise ValueError(
                    f"pattern {self.text!r}: write dotted segments, with '*' inside a segment and '**' as a "
                    "segment of its own"
                )

    @property
    def wildcards(self) -> list[str]:
        """The wildcards in order; a `**` that ends the pattern differs from one in front of a dot."""
        return _WILDCARD.findall(self.text)

    @property
    def is_exact(self) -> bool:
        return not self.wildcards

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        groups = {"**.": r"((?:[^.]+\.)*)", "**": r"([^.]+(?:\.[^.]+)*)", "*": r"([^.]+)"}
        parts, at = [], 0
        for match in _WILDCARD.finditer(self.text):
            parts += [re.escape(self.text[at : match.start()]), groups[match.group()]]
            at = match.end()
        return re.compile("".join(parts) + re.escape(self.text[at:]))

    def match(self, name: str) -> tuple[str, ...] | None:
        """What each wildcard matched, or None if the whole name does not match."""
        found = self._regex.fullmatch(name)
        return None if found is None else found.groups()

    def check_target(self, target: str) -> None:
        """**Raises** `ValueError` unless `target` has this pattern's wildcards in the same order."""
        theirs = Pattern(target).wildcards
        if [w.rstrip(".") for w in theirs] != [w.rstrip(".") for w in self.wildcards]:
            raise ValueError(
                f"{self.text!r} -> {target!r}: both sides need the same wildcards in the same order, "
                f"found {self.wildcards} and {theirs}"
            )

    def fill(self, target: str, captured: tuple[str, ...], rename: Callable[[str, bool], str]) -> str:
        """`target` with its wildcards replaced by what they matched.

        Literal text of the target is final. Each captured piece passes through `rename(piece, is_end)`, where
        `is_end` says that the piece ends the name and so contains the leaf.
        """
        pieces = iter(captured)
        last = len(captured) - 1
        out, at = [], 0
        for n, match in enumerate(_WILDCARD.finditer(target)):
            piece = next(pieces).rstrip(".")
            ends = n == last and match.end() == len(target) and self.text.endswith("*")
            piece = rename(piece, ends) if piece else piece
            dot = "." if piece and match.group() == "**." else ""
            out += [target[at : match.start()], piece + dot]
            at = match.end()
        return "".join(out) + target[at:]


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; nearest: …"`, or nothing if no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; nearest: {', '.join(close)}" if close else ""
