"""Applies a configuration to the parameters of a model: sites for those it adapts, a reason for every other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax import targets
from lora_jax.config import LoRAConfig
from lora_jax.layout import Layout
from lora_jax.sites import Site

Path = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One parameter of the model: its site if it is adapted, else why it is not."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    site: Site | None
    note: str
    op: str = ""

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def select(
    config: LoRAConfig, leaves: Mapping[Path, Any], layouts: Mapping[Path, Layout | str]
) -> tuple[tuple[Site, ...], tuple[Row, ...]]:
    """Sites and rows in the order of the parameters; raises on entries that name nothing adaptable."""
    chooser = _Chooser(config)
    rows = []
    for path, leaf in leaves.items():
        site, note = chooser.choose(path, leaf, layouts[path])
        layout = layouts[path]
        op = layout.op if isinstance(layout, Layout) else ""
        rows.append(Row(path, tuple(leaf.shape), str(leaf.dtype), site, note, op))
    chooser.check(rows)
    return tuple(row.site for row in rows if row.site is not None), tuple(rows)


class _Chooser:
    """Decides for one parameter at a time and remembers which entries did something."""

    def __init__(self, config: LoRAConfig):
        self.config = config
        self.targets = targets.Patterns(config.target_modules)
        self.excludes = targets.Patterns(config.exclude_modules)
        self.used: set[tuple[str, str]] = set()
        self.refused: dict[str, list[str]] = {}

    def choose(self, path: Path, leaf: Any, layout: Layout | str) -> tuple[Site | None, str]:
        config = self.config
        if saved := targets.saved_by(path, config.modules_to_save):
            self.used.add(("modules_to_save", saved))
            return Site(path, tuple(leaf.shape), str(leaf.dtype), "full"), "trained in full"
        if excluded := self.excludes.match(path):
            self.used.add(("exclude_modules", excluded[0]))
            return None, f"excluded by `{excluded[0]}`"
        entry, note = self._target(path, layout)
        if entry is None:
            return None, note
        if isinstance(layout, str):
            self.refused.setdefault(entry, []).append(f"`{'.'.join(path)}` {tuple(leaf.shape)}: {layout}")
            return None, layout
        self.used.add(("target_modules", entry))
        return self._site(path, leaf, layout), ""

    def _target(self, path: Path, layout: Layout | str) -> tuple[str | None, str]:
        """The entry that names this parameter, or None and the reason."""
        parts = path[-2:]
        if self.targets.all_linear:
            if isinstance(layout, str):
                return None, layout
            if layout.op not in ("linear", "experts"):
                return None, f"not linear ({layout.op})"
            if targets.ROUTERS & set(parts):
                return None, "a router (name it to adapt it)"
            if targets.HEADS & set(parts):
                return None, "an output head (name it to adapt it)"
            return targets.ALL_LINEAR, ""
        match = self.targets.match(path)
        if match is None:
            return None, layout if isinstance(layout, str) else "not targeted"
        entry, exact = match
        if targets.ROUTERS & set(parts) and not self.targets.names_literally(path):
            return None, "a router (name it to adapt it)"
        if not exact and not targets.in_layers(path, self.config):
            return None, "outside `layers_to_transform`"
        return entry, ""

    def _site(self, path: Path, leaf: Any, layout: Layout) -> Site:
        rank, alpha = self.config.rank, self.config.alpha
        if key := targets.from_pattern(path, dict(self.config.rank_pattern)):
            self.used.add(("rank_pattern", key))
            rank = self.config.rank_pattern[key]
        if key := targets.from_pattern(path, dict(self.config.alpha_pattern)):
            self.used.add(("alpha_pattern", key))
            alpha = self.config.alpha_pattern[key]
        return Site(
            path=path, shape=tuple(leaf.shape), dtype=str(leaf.dtype), op=layout.op, atoms=layout.atoms,
            roles=layout.roles, rank=int(rank), alpha=float(alpha), rslora=self.config.use_rslora,
            kernel_spec=layout.kernel_spec, groups=layout.groups, tied=layout.tied,
        )  # fmt: skip

    def check(self, rows: list[Row]) -> None:
        """Raises one error that lists every entry without effect."""
        config, problems = self.config, []
        paths = [row.path for row in rows]
        wanted = {
            "target_modules": self.targets.entries,
            "exclude_modules": self.excludes.entries,
            "modules_to_save": config.modules_to_save,
            "rank_pattern": tuple(config.rank_pattern),
            "alpha_pattern": tuple(config.alpha_pattern),
        }
        for name, entries in wanted.items():
            for entry in entries:
                known = targets.ALL_LINEAR if entry.lower() == targets.ALL_LINEAR else entry
                if (name, known) in self.used:
                    continue
                if refused := self.refused.get(entry):
                    problems.append(f"`{name}` entry `{entry}` names only parameters that cannot be adapted: "
                                    + "; ".join(refused[:4]))  # fmt: skip
                else:
                    problems.append(
                        f"`{name}` entry `{entry}` matches nothing; closest: {targets.nearest(entry, paths)}"
                    )
        if problems:
            raise ValueError(
                "the configuration does not fit the model. " + ". ".join(problems) + ". Correct or remove these "
                "entries; `print(lora_jax.plan(..., config=LoRAConfig()))` lists every parameter."
            )
