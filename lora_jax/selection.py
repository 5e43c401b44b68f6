"""Applies a configuration to the parameters of a model: sites for those it adapts, a reason for every other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from lora_jax import targets
from lora_jax.config import LoRAConfig
from lora_jax.entries import Entries, cannot_train
from lora_jax.layout import Layout
from lora_jax.rows import Row
from lora_jax.sites import Site
from lora_jax.token_rows import with_tokens

Path = tuple[str, ...]


def select(
    config: LoRAConfig, leaves: Mapping[Path, Any], layouts: Mapping[Path, Layout | str]
) -> tuple[tuple[Site, ...], tuple[Row, ...]]:
    """Sites and rows in the order of the parameters; raises on entries without effect."""
    chooser = _Chooser(config)
    rows = []
    for path, leaf in leaves.items():
        site, note = chooser.choose(path, leaf, layouts[path])
        layout = layouts[path]
        op = layout.op if isinstance(layout, Layout) else ""
        rows.append(Row(path, tuple(leaf.shape), str(leaf.dtype), site, note, op))
    chooser.check(rows)
    rows = _with_biases(config, with_tokens(config, rows, layouts), layouts)
    return tuple(row.site for row in rows if row.site is not None), tuple(rows)


def _with_biases(config: LoRAConfig, rows: list[Row], layouts: Mapping[Path, Layout | str]) -> list[Row]:
    """The rows with what `bias` trains in full, which neither names nor layers restrict, as in PEFT."""
    if config.bias == "none":
        return rows
    adapted = {row.path[:-1] for row in rows if row.site is not None and not row.site.is_full}
    out, found = [], False
    for row in rows:
        reason = layouts[row.path]
        wanted = row.path[-1] == "bias" and (config.bias == "all" or row.path[:-1] in adapted)
        trains = jnp.issubdtype(row.dtype, jnp.floating) and not (isinstance(reason, str) and cannot_train(reason))
        if wanted and trains:
            found = True
            if row.site is None:
                row = replace(row, site=Site(row.path, row.shape, row.dtype, "full"), note="trained in full (`bias`)")
        out.append(row)
    if not found:
        where = "" if config.bias == "all" else " in the adapted modules"
        raise ValueError(f"`bias={config.bias!r}` finds no parameter called `bias`{where}; write bias='none'.")
    return out


class _Chooser:
    """Decides for one parameter at a time and remembers which entries did something."""

    def __init__(self, config: LoRAConfig):
        self.config = config
        self.targets = targets.Patterns(config.target_modules)
        self.excludes = targets.Patterns(config.exclude_modules)
        self.entries = Entries({
            "target_modules": self.targets.entries,
            "exclude_modules": self.excludes.entries,
            "modules_to_save": config.modules_to_save,
            "rank_pattern": tuple(config.rank_pattern),
            "alpha_pattern": tuple(config.alpha_pattern),
        })  # fmt: skip
        self.layers: set[int] = set()  # that hold something targeted
        self.lists: set[str | None] = set()  # the entries of `layers_pattern` that told a layer of it

    def choose(self, path: Path, leaf: Any, layout: Layout | str) -> tuple[Site | None, str]:
        entries = self.entries
        targeted = self.targets.matches(path)
        named = [entry for entry, _ in targeted]
        excluded = [entry for entry, _ in self.excludes.matches(path)]
        if saved := targets.saved_by(path, self.config.modules_to_save):
            entries.stop("target_modules", named, f"`modules_to_save` entry `{saved[0]}` trains what it names")
            entries.stop("exclude_modules", excluded, f"`modules_to_save` entry `{saved[0]}` trains what it names")
            return self._saved(path, leaf, layout, saved)
        if excluded:
            entries.use("exclude_modules", excluded, path)
            entries.stop("target_modules", named, f"`exclude_modules` entry `{excluded[0]}` excludes what it names")
            return None, f"excluded by `{excluded[0]}`"
        if self.targets.all_linear:
            named, note = self._all_linear(path, layout)
        else:
            named, note = self._by_name(path, layout, targeted)
        if not named:
            return None, note
        if self.config.lora_bias and isinstance(layout, Layout) and (layout.op == "embedding" or layout.tied):
            layout = "a table, which is looked up: `lora_bias` adds to products only"
        if self.config.use_qalora and isinstance(layout, Layout):
            layout = self._groupable(layout)
        if isinstance(layout, str):
            entries.refuse("target_modules", named, path, tuple(leaf.shape), layout)
            return None, layout
        entries.use("target_modules", named, path)
        self._note_layer(path)
        return self._site(path, leaf, layout), ""

    def _saved(self, path: Path, leaf: Any, layout: Layout | str, saved: list[str]) -> tuple[Site | None, str]:
        reason = layout if isinstance(layout, str) and cannot_train(layout) else ""
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            reason = "not floating point"
        if reason:
            self.entries.refuse("modules_to_save", saved, path, tuple(leaf.shape), reason)
            return None, reason
        self.entries.use("modules_to_save", saved, path)
        tied = isinstance(layout, Layout) and layout.tied and layout.op == "embedding"
        return Site(path, tuple(leaf.shape), str(leaf.dtype), "full", tied=tied), "trained in full"

    def _all_linear(self, path: Path, layout: Layout | str) -> tuple[list[str], str]:
        """The entry, or none and the reason."""
        parts = set(path[-2:])
        if isinstance(layout, str):
            return [], layout
        if layout.op not in ("linear", "experts"):
            return [], f"not linear ({layout.op})"
        if targets.ROUTERS & parts:
            return [], "a router (name it to adapt it)"
        if targets.HEADS & parts:
            return [], "an output head (name it to adapt it)"
        return list(self.targets.entries), ""

    def _by_name(self, path: Path, layout: Layout | str, targeted: list[tuple[str, bool]]) -> tuple[list[str], str]:
        """The entries that name this parameter and that nothing stops, or none and the reason."""
        entries, named = self.entries, [entry for entry, _ in targeted]
        if not named:
            return [], layout if isinstance(layout, str) else "not targeted"
        if targets.ROUTERS & set(path[-2:]) and not self.targets.names_literally(path):
            entries.stop("target_modules", named, f"`{'.'.join(path)}` is a router: spell out its name to adapt it")
            return [], "a router (name it to adapt it)"
        inside = targets.in_layers(path, self.config)
        if not inside:
            # An entry that spells out the whole name is an order of its own, as in PEFT.
            outside = [entry for entry, exact in targeted if not exact]
            layer = targets.layer_of(path, self.config)
            where = "no layer" if layer is None else f"layer {layer[0]}"
            entries.stop("target_modules", outside, f"`layers_to_transform` leaves out what it names in {where}")
            named = [entry for entry, exact in targeted if exact]
            if layer is not None and isinstance(layout, Layout):
                self.lists.add(layer[1])
        return named, "" if named else "outside `layers_to_transform`"

    def _note_layer(self, path: Path) -> None:
        if self.config.layers_to_transform is not None and (layer := targets.layer_of(path, self.config)):
            self.layers.add(layer[0])
            self.lists.add(layer[1])

    def _groupable(self, layout: Layout) -> Layout | str:
        inner = [atom for atom, role in zip(layout.atoms, layout.roles, strict=True) if role == "i"]
        size = self.config.qalora_group_size
        if layout.op != "linear" or layout.tied or len(inner) != 1:
            return f"no linear layer of one input axis ({layout.op}), as `use_qalora` needs"
        return f"{inner[0].size} inputs are no groups of `qalora_group_size={size}`" if inner[0].size % size else layout

    def _site(self, path: Path, leaf: Any, layout: Layout) -> Site:
        config = self.config
        rank = self._value("rank_pattern", path, config.rank_pattern, config.rank)
        alpha = self._value("alpha_pattern", path, config.alpha_pattern, config.alpha)
        return Site(
            path=path, shape=tuple(leaf.shape), dtype=str(leaf.dtype), op=layout.op, atoms=layout.atoms,
            roles=layout.roles, rank=int(rank), alpha=float(alpha), rslora=config.use_rslora,
            kernel_spec=layout.kernel_spec, groups=layout.groups, tied=layout.tied, dora=config.use_dora,
            lora_bias=config.lora_bias, group=config.qalora_group_size if config.use_qalora else 1,
        )  # fmt: skip

    def _value(self, field: str, path: Path, pattern: Mapping[str, float], usual: float) -> float:
        keys = targets.pattern_keys(path, pattern)
        if not keys:
            return usual
        value = pattern[keys[0]]
        self.entries.use(field, [key for key in keys if pattern[key] == value], path)
        self.entries.stop(field, keys[1:], f"`{keys[0]}` stands before it and matches what it matches; put it first")
        return value

    def check(self, rows: list[Row]) -> None:
        """Raises one error that lists every entry without effect, and every weight that an entry names in vain."""
        paths = [row.path for row in rows]
        problems = self.entries.without_effect(paths)
        catch_all = self.targets.is_text and all(map(self.targets.matches, paths))
        problems += self.entries.skipped("target_modules", catch_all or self.targets.all_linear)
        problems += self.entries.skipped("modules_to_save", catch_all=False)
        problems += [] if problems else self._empty_layers()
        if problems:
            raise ValueError(
                "the configuration does not fit the model. " + ". ".join(problems) + ". Correct or remove these "
                "entries, or leave parameters out with `exclude_modules`; "
                "`print(lora_jax.plan(..., config=LoRAConfig()))` lists every parameter."
            )

    def _empty_layers(self) -> list[str]:
        config = self.config
        problems = [
            f"`layers_to_transform` names layer {layer}, which holds nothing targeted"
            for layer in config.layers_to_transform or ()  # type: ignore[union-attr]
            if layer not in self.layers
        ]
        problems += [
            f"`layers_pattern` entry `{one}` is the list of no targeted layer"
            for one in config.layers_pattern or ()
            if one not in self.lists
        ]
        return problems
