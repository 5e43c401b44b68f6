"""The lines of a naming table, and what one line makes of one leaf."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layouts import Layout
from .patterns import Pattern

# `{i}` stands for the index of the outermost stack of layers, `{j}` for the next …
STACK_LABELS = ("{i}", "{j}", "{k}", "{l}")


@dataclass(frozen=True)
class Rule:
    """One line of a table, read from the Flax side.

    **Fields:**

    - `match`: pattern over the dotted Flax path, leaf included: `"layers.*.attn.kv_einsum.w"`.
    - `to`: the PyTorch name, with the same wildcards. Its literal text is final; what the wildcards matched
        follows the general rules. A tuple names the tensors of a layout's split axis in order; an axis in
        braces numbers them: `to="*.experts.{e}.up_proj.weight", layout="e d f -> f d"`.
    - `layout`: see `lora_torch.layouts`. A tuple lists alternatives that only shapes can tell apart.
    - `part`, `axis`: the leaf is the `part`-th slice of the tensor along `axis`; `in_proj_weight` of
        `torch.nn.MultiheadAttention` has three.

    **Raises:** `ValueError` for a malformed pattern or layout, or if `to` does not name each split axis.
    """

    match: str
    to: str | tuple[str, ...] | None = None
    layout: str | tuple[str, ...] | None = None
    part: int | None = None
    axis: int = 0

    def __post_init__(self) -> None:
        pattern = Pattern(self.match)
        for target in self.targets:
            pattern.check_target(target)
        if not self.targets and not self.layouts:
            raise ValueError(f"rule {self.match!r} states neither a name (`to`) nor a `layout`")
        if self.part is not None and (len(self.targets) != 1 or self.part < 0):
            raise ValueError(f"rule {self.match!r}: `part` counts from 0 and needs one name in `to`")
        if isinstance(self.to, tuple) and not self.layouts:
            raise ValueError(f"rule {self.match!r}: several names in `to` need a layout that splits the array")
        for layout in self.parsed:
            listed = [axis for axis in layout.split if not all(f"{{{axis}}}" in to for to in self.targets)]
            if self.targets and len(listed) != isinstance(self.to, tuple):
                raise ValueError(
                    f"rule {self.match!r}: layout '{layout.spec}' splits the axes {list(layout.split)}, which "
                    f"to={self.to!r} does not name; number an axis as '{{axis}}', or list one axis in a tuple"
                )
            if any(f"{{{axis}}}" in STACK_LABELS for axis in layout.split):
                raise ValueError(
                    f"rule {self.match!r}: {list(STACK_LABELS)} number stacks of layers; call the split axes of "
                    f"'{layout.spec}' otherwise"
                )

    @property
    def targets(self) -> tuple[str, ...]:
        return () if self.to is None else (self.to,) if isinstance(self.to, str) else self.to

    @property
    def layouts(self) -> tuple[str, ...]:
        return () if self.layout is None else (self.layout,) if isinstance(self.layout, str) else self.layout

    @property
    def parsed(self) -> tuple[Layout, ...]:
        return tuple(Layout.parse(text) for text in self.layouts)


@dataclass(frozen=True)
class Preset:
    """What is known of one family of models.

    **Fields:** `rules`; `numbered_names`, whether `layers_0` means `layers.0`; `ignore`, patterns of PyTorch
    buffers that the family's Flax models lack.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    numbered_names: bool = True
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """Where one Flax leaf goes.

    **Fields:** `names`, the PyTorch name, or one for each index of a split axis; stacks and numbered axes still
    stand as `{i}`. `layouts`, one if it is known, else the possible ones. `stack_axes`: see `Layout.bind`.
    `part`, `axis`: see `Rule`.
    """

    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    stack_axes: tuple[int, ...] = ()
    part: int | None = None
    axis: int = 0

    def expand(self, layout: Layout, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Final names of an array of `shape`, each with its index over (stacks, split axes), in the order of
        `BoundLayout.to_torch`. **Raises** `ValueError` if a name does not say where an index goes."""
        sizes = layout.bind(shape, self.stack_axes).split_shape
        labels = [*STACK_LABELS[: len(self.stack_axes)], *(f"{{{axis}}}" for axis in layout.split)]
        listed = [at for at, label in enumerate(labels) if not all(label in name for name in self.names)]
        counts = [sizes[at] for at in listed]
        if counts != [len(self.names)] and (counts or len(self.names) > 1):
            what = ", ".join(f"{labels[at]} of length {sizes[at]}" for at in listed) or "no axis"
            raise ValueError(f"{what} left to be told apart by the name(s) {list(self.names)}")
        out: dict[str, tuple[int, ...]] = {}
        for index in np.ndindex(*sizes):
            name = self.names[index[listed[0]] if listed else 0]
            for label, at in zip(labels, index, strict=True):
                name = name.replace(label, str(at))
            out[name] = index
        return out
