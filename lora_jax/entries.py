"""What each entry of a configuration did to a model, so that one without effect becomes an error that says why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_jax import targets

Path = tuple[str, ...]

# Reasons that hold for biases, norms and counters beside the weights that a name means.
_BESIDE = ("a vector", "a scalar", "not floating point")
# Reasons that hold for real weights only.
_UNTRAINABLE = ("never used", "used, but reaches no output", "under stop_gradient")

_VERBS = {"target_modules": "adapted", "modules_to_save": "trained"}


def cannot_train(reason: str) -> bool:
    """Whether no gradient ever reaches a parameter with this reason not to adapt it."""
    return reason.startswith(_UNTRAINABLE)


class Entries:
    """The entries of a configuration's fields: which did something, and what stopped the others."""

    def __init__(self, fields: dict[str, Sequence[str]]):
        self._fields = fields
        self._used: dict[tuple[str, str], list[Path]] = {}
        self._stopped: dict[tuple[str, str], dict[str, None]] = {}
        self._refused: dict[tuple[str, str], list[tuple[Path, tuple[int, ...], str]]] = {}

    def use(self, field: str, entries: Iterable[str], path: Path) -> None:
        """Notes that these entries decided about a parameter."""
        for entry in entries:
            self._used.setdefault((field, entry), []).append(path)

    def stop(self, field: str, entries: Iterable[str], reason: str) -> None:
        """Notes why these entries, which name a parameter, do not decide about it."""
        for entry in entries:
            self._stopped.setdefault((field, entry), {})[reason] = None

    def refuse(self, field: str, entries: Iterable[str], path: Path, shape: tuple[int, ...], reason: str) -> None:
        """Notes a parameter that these entries name and that cannot be trained."""
        for entry in entries:
            self._refused.setdefault((field, entry), []).append((path, shape, reason))

    def without_effect(self, paths: Sequence[Path]) -> list[str]:
        """One sentence for each entry that changed nothing."""
        return [
            self._why(field, entry, paths)
            for field, entries in self._fields.items()
            for entry in entries
            if (field, entry) not in self._used
        ]

    def skipped(self, field: str, catch_all: bool) -> list[str]:
        """One sentence for each entry that adapts some of the weights it names, and cannot adapt others.

        **Arguments:** `catch_all`: the entry names every parameter of the model, and so asks for whatever can be
        adapted.
        """
        out = []
        for entry in () if catch_all else self._fields[field]:
            adapted = {path[-1] for path in self._used.get((field, entry), ())}
            lost = [
                f"`{'.'.join(path)}` {shape}: {reason}"
                for path, shape, reason in self._refused.get((field, entry), ())
                if adapted and len(shape) > 1 and not reason.startswith(_BESIDE)
                if cannot_train(reason) or path[-1] in adapted
            ]
            if lost:
                out.append(
                    f"`{field}` entry `{entry}` also names weights that cannot be {_VERBS[field]}: {_some(lost)}"
                )
        return out

    def _why(self, field: str, entry: str, paths: Sequence[Path]) -> str:
        key = (field, entry)
        if refused := self._refused.get(key):
            lines = [f"`{'.'.join(path)}` {shape}: {reason}" for path, shape, reason in refused]
            return f"`{field}` entry `{entry}` names only parameters that cannot be {_VERBS[field]}: {_some(lines)}"
        if reasons := self._stopped.get(key):
            return f"`{field}` entry `{entry}` has no effect: {_some(list(reasons))}"
        if field == "target_modules" and entry.lower() == targets.ALL_LINEAR:
            return f"`{field}='{entry}'` finds no linear weight"
        return f"`{field}` entry `{entry}` matches nothing; closest: {targets.nearest(entry, paths)}"


def _some(lines: Sequence[str], most: int = 4) -> str:
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more
