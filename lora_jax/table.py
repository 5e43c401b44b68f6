"""The plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_jax.planning import Plan

HEADER = ("parameter", "op", "shape", "roles", "rank", "lora_A", "lora_B", "parameters", "note")


def plan_table(plan: Plan) -> str:
    """One line per parameter; adapted ones with roles and factor shapes, the others with the reason."""
    formed: dict[str, set[str]] = {}
    for name, primitive, _ in plan.materialised:
        formed.setdefault(name, set()).add(primitive)
    lines: list[tuple[str, ...]] = [HEADER]
    for row in plan.rows:
        site = row.site
        if site is None:
            lines.append((row.name, row.op, _shape(row.shape), "", "", "", "", "", row.note))
        elif site.is_full:
            lines.append((row.name, "full", _shape(row.shape), "", "", "", "", f"{site.parameters:,}", row.note))
        else:
            note = f"formed in full by {', '.join(sorted(formed[row.name]))}" if row.name in formed else ""
            if site.rank >= min(site.fan_in, site.fan_out):
                note = f"{note}; " * bool(note) + f"rank is not below min(in, out) = {min(site.fan_in, site.fan_out)}"
            lines.append(
                (row.name, site.op, _shape(_sizes(row)), _roles(row), str(site.rank), _shape(site.a_shape),
                 _shape(site.b_shape), f"{site.parameters:,}", note)
            )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], plan.summary()])


def _sizes(row) -> tuple[int, ...]:
    return tuple(atom.size for atom in row.site.atoms)


def _roles(row) -> str:
    words = {"l": "lead", "i": "in", "o": "out"}
    return " ".join(words[letter] for letter in row.site.roles)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
