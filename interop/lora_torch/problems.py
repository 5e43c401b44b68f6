"""Everything that is wrong with a conversion, told in one error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .naming import nearest

# Looking for near names compares every pair; after this many a reader has seen the pattern.
_SUGGESTIONS = 20


class StateDictError(ValueError):
    """A state dict and a parameter tree do not fit.

    **Fields:** `missing`, `unexpected` and `misshapen`, PyTorch names; `ambiguous`, Flax names whose layout must be
    stated; the message lists them all, with shapes, near names and what to pass.
    """

    def __init__(self, problems: Problems) -> None:
        self.missing = tuple(problems.missing)
        self.unexpected = tuple(problems.unexpected)
        self.misshapen = tuple(problems.misshapen)
        self.ambiguous = tuple(problems.ambiguous)
        super().__init__(problems.text())


@dataclass
class Problems:
    """Collects faults by name, then raises them together. Values say what is known of each name."""

    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    misshapen: dict[str, str] = field(default_factory=dict)
    ambiguous: dict[str, str] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)

    def suggest(self, missing_from: Iterable[str], unexpected_in: Iterable[str]) -> None:
        """Adds near names: for a missing name among `missing_from`, for an unexpected one among `unexpected_in`."""
        for faults, known in ((self.missing, list(missing_from)), (self.unexpected, list(unexpected_in))):
            for name in list(faults)[:_SUGGESTIONS]:
                faults[name] += nearest(name, known)

    def text(self) -> str:
        sections = [
            ("missing from the state dict", self.missing),
            ("unexpected in the state dict", self.unexpected),
            ("misshapen", self.misshapen),
            ("layout unknown (state `preset=…`, or `layouts={name: layout}`)", self.ambiguous),
        ]
        lines = []
        for title, faults in sections:
            if faults:
                lines.append(f"{len(faults)} {title}:")
                lines += [f"  {name}{detail}" for name, detail in faults.items()]
        if self.other:
            lines += [f"{len(self.other)} other:", *(f"  {text}" for text in self.other)]
        return "state dict and parameters do not fit.\n" + "\n".join(lines)

    def raise_if_any(self) -> None:
        if self.missing or self.unexpected or self.misshapen or self.ambiguous or self.other:
            raise StateDictError(self)
