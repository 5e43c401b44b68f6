"""PyTorch names of Flax parameters: a literal, ordered table of rules over general ones.

The general rules, which need no table:

    kernel, scale, embedding   -> weight
    mean, var (BatchNorm)      -> running_mean, running_var
    layers_0                   -> layers.0     (unless the preset keeps names as they are)
    a stack of layers          -> layers.{i}   (`stacks=("layers",)`: scan and vmap stack an axis there)

Everything else keeps its name. A `Rule` renames or lays out what these cannot know; the first that matches
counts: the caller's before the preset's, and among the caller's the exact ones before those with wildcards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .layouts import CONV, HEADS_BIAS, HEADS_FIRST, HEADS_IN, HEADS_OUT, LINEAR, SAME, Layout
from .patterns import Pattern
from .patterns import nearest as nearest
from .rules import STACK_LABELS, Preset, Rule, Target

Path = tuple[str, ...]

LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}

# The tensors of a PyTorch module. A name that ends otherwise is a raw parameter, which is its own adapter site.
TENSOR_NAMES = frozenset({"weight", "bias", "w", "running_mean", "running_var"})

# What a leaf can be when no rule states its layout. Only the shape of a PyTorch tensor chooses among these.
_KERNEL = (LINEAR, SAME, HEADS_IN, HEADS_OUT, HEADS_FIRST, CONV, "d s n h -> (s n h) d")
_POSSIBLE = {"kernel": _KERNEL, "bias": (SAME, HEADS_BIAS)}

_NUMBERED = re.compile(r"(.*[^_\d])_(\d+)")


@dataclass(frozen=True)
class Naming:
    """The whole table for one model: what names and layouts are made of.

    **Arguments:**

    - `preset`: `"linen"`, `"nnx"`, `"hf-flax"`, `"tunix"`, `"gemma"` (see `lora_torch.presets`), a `Preset` of
        your own, or None: the general names, and layouts only where a shape proves them.
    - `names`: exact or wildcard renames, Flax path to PyTorch name, short for `Rule(match, to=…)`.
    - `layouts`: layouts by Flax path, short for `Rule(match, layout=…)`.
    - `rules`: rules that need both, or more.
    - `stacks`: prefixes below which every leaf carries a stacked axis (`nn.scan`, `nnx.vmap`): axis 0, or the
        axis given as the value of a mapping. They may nest: `("stages", "stages.layers")`.

    **Raises:** `ValueError` for an unknown preset, a malformed pattern or layout.
    """

    preset: str | Preset | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    rules: Sequence[Rule] = ()
    stacks: Sequence[str] | Mapping[str, int] = ()

    @cached_property
    def family(self) -> Preset:
        from .presets import PRESETS

        if isinstance(self.preset, str):
            if self.preset not in PRESETS:
                raise ValueError(f"preset {self.preset!r} does not exist; there are {sorted(PRESETS)}")
            return PRESETS[self.preset]
        return self.preset or Preset("general")

    @cached_property
    def own_rules(self) -> tuple[Rule, ...]:
        """The caller's rules, the exact ones first."""
        rules = [
            *self.rules,
            *(Rule(match, to=to) for match, to in self.names.items()),
            *(Rule(match, layout=layout) for match, layout in self.layouts.items()),
        ]
        return tuple(sorted(rules, key=lambda rule: not Pattern(rule.match).is_exact))

    @cached_property
    def _stacks(self) -> tuple[tuple[Pattern, int], ...]:
        stacks = (self.stacks,) if isinstance(self.stacks, str) else self.stacks
        pairs = stacks.items() if isinstance(stacks, Mapping) else [(prefix, 0) for prefix in stacks]
        return tuple((Pattern(prefix), axis) for prefix, axis in pairs)

    @cached_property
    def _matchers(self) -> tuple[tuple[Pattern, Rule, bool], ...]:
        rules = [(rule, True) for rule in self.own_rules] + [(rule, False) for rule in self.family.rules]
        return tuple((Pattern(rule.match), rule, own) for rule, own in rules)

    def target(self, path: Path, ndim: int | None = None) -> Target:
        """Names and possible layouts of the leaf at `path`; without `ndim`, of any number of axes."""
        dotted, stack_axes = self._with_stacks(path)
        found = [(p, rule, own, p.match(dotted)) for p, rule, own in self._matchers]
        found = [(p, rule, own, captured) for p, rule, own, captured in found if captured is not None]
        named = next(((p, rule, captured) for p, rule, _, captured in found if rule.targets), None)
        if named is None:
            names, part, axis = (self._general(dotted, True),), None, 0
        else:
            pattern, rule, captured = named
            names = tuple(pattern.fill(to, captured, self._general) for to in rule.targets)
            part, axis = rule.part, rule.axis
        base = None if ndim is None else ndim - len(stack_axes)
        layouts: tuple[Layout, ...] = ()
        for _, rule, own, _ in found:
            fits = tuple(layout for layout in rule.parsed if base is None or layout.accepts(base))
            if rule.layouts and (fits or own):  # a layout that the caller states never gives way silently
                layouts = fits or rule.parsed
                break
        if not layouts:
            possible = [Layout.parse(text) for text in _POSSIBLE.get(path[-1], (SAME,))]
            layouts = tuple(layout for layout in possible if base is None or layout.accepts(base))
            if base is not None and base < 2:
                layouts = (Layout.parse(SAME),)
        return Target(names, layouts, stack_axes, part, axis)

    def unused(self, paths: Iterable[Path]) -> list[str]:
        """What the caller stated (not the preset) that touches none of `paths`, each with the nearest name."""
        paths = list(paths)
        dotted = [self._with_stacks(path)[0] for path in paths]
        prefixes = sorted({".".join(path[:depth]) for path in paths for depth in range(1, len(path))})
        out = []
        for rule in self.own_rules:
            if not any(Pattern(rule.match).match(name) is not None for name in dotted):
                out.append(f"rule {rule.match!r} matches no parameter{nearest(rule.match, dotted)}")
        for pattern, _ in self._stacks:
            if not any(pattern.match(name) is not None for name in prefixes):
                out.append(f"stack {pattern.text!r} matches no module{nearest(pattern.text, prefixes)}")
        return out

    def _with_stacks(self, path: Path) -> tuple[str, tuple[int, ...]]:
        """The dotted path with `{i}` after each stacked prefix, and the axes of these stacks, outermost first."""
        segments: list[str] = []
        axes: list[int] = []
        for depth, segment in enumerate(path):
            segments.append(segment)
            prefix = ".".join(path[: depth + 1])
            axis = next((axis for pattern, axis in self._stacks if pattern.match(prefix) is not None), None)
            if axis is not None and depth + 1 < len(path):
                if len(axes) == len(STACK_LABELS):
                    raise ValueError(f"{'.'.join(path)} lies in more than {len(STACK_LABELS)} stacks")
                segments.append(STACK_LABELS[len(axes)])
                axes.append(axis)
        return ".".join(segments), tuple(axes)

    def _general(self, piece: str, is_end: bool) -> str:
        """The general rules on a run of segments; the last is a leaf if `is_end`."""
        segments = piece.split(".")
        modules, leaf = (segments[:-1], segments[-1:]) if is_end else (segments, [])
        if self.family.numbered_names:
            modules = [_NUMBERED.sub(r"\1.\2", s) if _NUMBERED.fullmatch(s) else s for s in modules]
        return ".".join([*modules, *(LEAF_NAMES.get(name, name) for name in leaf)])


def torch_names(path: Path, naming: Naming | None = None) -> tuple[str, ...]:
    """PyTorch names of one Flax leaf: several if a rule splits it, as a fused key-value kernel.

    Stacks and numbered split axes stand as `{i}`.

    >>> torch_names(("layers_0", "attn", "q", "kernel"))
    ('layers.0.attn.q.weight',)
    >>> torch_names(("layers", "attn", "q", "kernel"), Naming(stacks=("layers",)))
    ('layers.{i}.attn.q.weight',)
    """
    return (naming or Naming()).target(tuple(path)).names


def torch_name(path: Path, naming: Naming | None = None) -> str:
    """`torch_names` of a leaf that has one name. **Raises** `ValueError` if a rule splits it into several."""
    names = torch_names(path, naming)
    if len(names) != 1:
        raise ValueError(f"{'.'.join(path)} becomes several tensors {list(names)}; use `torch_names`")
    (name,) = names
    return name


def module_names(path: Path, naming: Naming | None = None) -> tuple[str, ...]:
    """Names of the PyTorch modules that own a leaf: what an adapter on this parameter is called.

    A raw parameter, whose name does not end in `weight`, is its own module.

    >>> module_names(("model", "layers", "0", "self_attn", "q_proj", "kernel"))
    ('model.layers.0.self_attn.q_proj',)
    """
    return tuple(_module(name) for name in torch_names(path, naming))


def module_name(path: Path, naming: Naming | None = None) -> str:
    """`module_names` of a leaf that has one. **Raises** `ValueError` if a rule splits it into several."""
    return _module(torch_name(path, naming))


def module_index(
    shapes: Mapping[Path, tuple[int, ...]], naming: Naming | None = None
) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The inverse of `module_names`: each PyTorch module's Flax leaf, and its index over the leaf's stacked and
    split axes (stacks outermost first, then split axes).

    **Arguments:** `shapes` of the parameters in question, by path (an adapter's sites, not their biases).

    **Raises:** `ValueError` if two parameters claim one module, or a layout does not fit a shape.

    >>> module_index({("layers", "q", "kernel"): (2, 8, 8)}, Naming(stacks=("layers",)))["layers.1.q"]
    (('layers', 'q', 'kernel'), (1,))
    """
    naming = naming or Naming()
    out: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path, shape in shapes.items():
        target = naming.target(tuple(path), len(shape))
        expanded = [target.expand(layout, tuple(shape)) for layout in target.layouts]
        if not expanded or any(names != expanded[0] for names in expanded):
            raise ValueError(f"cannot tell how {'.'.join(path)}, shape {tuple(shape)}, is split; state its layout")
        for name, index in expanded[0].items():
            module = _module(name)
            if module in out:
                raise ValueError(
                    f"{'.'.join(path)} and {'.'.join(out[module][0])} both become the module {module!r}; rename one "
                    "with `names`"
                )
            out[module] = (tuple(path), index)
    return out


def _module(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return module if leaf in TENSOR_NAMES and module else name
