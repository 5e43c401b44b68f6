"""From recorded uses of a parameter to its axis roles.

Any split of a weight's axes into lead, in and out gives an exact low-rank weight; the right one keeps every use
cheap. The first use decides; a use that contracts the other side (a tied head) fits the same split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_jax.sites import Atom
from lora_jax.weights.probe import Record, Use


@dataclass(frozen=True)
class Layout:
    """Roles of a parameter's axes, and the operation they were read from."""

    op: str
    atoms: tuple[Atom, ...]
    roles: str
    kernel_spec: tuple[int, ...] | None = None
    groups: int = 1
    tied: bool = False


def layout_of(record: Record, shape: tuple[int, ...]) -> Layout | str:
    """The layout of a parameter, or the reason why it has none."""
    if len(shape) < 2:
        return "a vector"
    uses = sorted(record.all_uses(stopped=False), key=_names_sides)
    stopped = record.all_uses(stopped=True)
    reasons = []
    for use in uses:
        layout = _from_use(use, shape)
        if isinstance(layout, Layout):
            return replace(layout, tied=any(_swaps(other, layout) for other in [*uses, *stopped]))
        reasons.append(layout)
    if reasons:
        return reasons[0]
    if stopped:
        return "under stop_gradient: would never train"
    if record.dense:
        return f"never contracted (used by {', '.join(sorted({d.primitive for d in record.dense}))})"
    return "never used"


def _swaps(use: Use, layout: Layout) -> bool:
    """Whether a use contracts what the layout keeps, or keeps what it contracts."""
    sides = list(zip(layout.atoms, layout.roles, strict=True))
    other = {"i": "o", "o": "i"}
    return any(
        other.get(letter) == side and atom.axis == own.axis and len({r for a, r in sides if a.axis == own.axis}) == 1
        for atom, letter in use.roles
        for own, side in sides
    )


def _names_sides(use: Use) -> int:
    """Sort key. A table's lookup names its sides; one that picks whole matrices says little about them."""
    row = [atom.axis for atom, role in use.roles if role == "o"]
    return 1 if use.op != "embedding" else 0 if len(set(row)) == 1 else 2


def stated_layout(roles: str, shape: tuple[int, ...], op: str = "linear") -> Layout:
    """The layout a user states, one letter of `lio` per axis."""
    if len(roles) != len(shape) or set(roles) - set("lio") or not {"i", "o"} <= set(roles):
        raise ValueError(
            f"axis roles {roles!r} do not fit shape {shape}: write one letter per axis, l (stacked), i (in) or "
            "o (out), with at least one i and one o."
        )
    return Layout(op, tuple(Atom(d, 1, n) for d, n in enumerate(shape)), roles)


def _from_use(use: Use, shape: tuple[int, ...]) -> Layout | str:
    atoms: list[Atom] = []
    roles = ""
    for axis, length in enumerate(shape):
        parts = sorted((a for a, _ in use.roles if a.axis == axis), key=lambda a: -a.stride)
        letters = [dict(use.roles)[a] for a in parts]
        if len(set(letters)) <= 1:
            atoms.append(Atom(axis, 1, length))
            roles += letters[0] if letters else "l"
        elif _is_radix(parts, length):
            atoms += parts
            roles += "".join(letters)
        else:
            return "an axis is cut into pieces of different roles"
    if "i" not in roles or "o" not in roles:
        return "a vector in each layer" if "l" in roles else "no axis is contracted while another is kept"
    return Layout(use.op, tuple(atoms), roles, use.kernel_spec, use.groups)


def _is_radix(parts: list[Atom], length: int) -> bool:
    stride = 1
    for atom in reversed(parts):
        if atom.stride != stride:
            return False
        stride *= atom.size
    return stride == length
