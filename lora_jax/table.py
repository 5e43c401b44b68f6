"""The plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_jax.planning import Plan
    from lora_jax.sites import Site

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
        elif not site.is_low_rank:
            op = "full" if site.is_full else f"{site.op} rows"
            lines.append((row.name, op, _shape(row.shape), "", "", "", "", f"{site.parameters:,}", row.note))
        else:
            notes = [f"formed in full by {', '.join(sorted(formed[row.name]))}"] if row.name in formed else []
            notes += ["DoRA"] if site.dora else []
            notes += ["bias on B"] if site.lora_bias else []
            notes += [f"A in groups of {site.group}"] if site.group > 1 else []
            notes += [row.note] if row.note else []
            if site.rank >= min(site.fan_in, site.fan_out):
                notes.append(f"rank is not below min(in, out) = {min(site.fan_in, site.fan_out)}")
            if shared := _one_a_for_all(site):
                notes.append(shared)
            lines.append(
                (row.name, site.op, _shape(_sizes(row)), _roles(row), str(site.rank), _shape(site.a_shape),
                 _shape(site.b_shape), f"{site.parameters:,}", "; ".join(notes))
            )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], plan.summary()])


def _one_a_for_all(site: Site) -> str:
    """A word on weights such as (heads, in, out) and (members, in, out), which the trace cannot tell apart."""
    axes = [atom.axis for atom in site.atoms]
    if site.op != "linear" or site.roles[:2] != "oi" or "o" not in site.roles[2:] or len(set(axes)) < len(axes):
        return ""
    return f"axis 0 shares one lora_A; one for each: axis_roles={{{site.name!r}: {'l' + site.roles[1:]!r}}}"


def _sizes(row) -> tuple[int, ...]:
    return tuple(atom.size for atom in row.site.atoms)


def _roles(row) -> str:
    words = {"l": "lead", "i": "in", "o": "out"}
    return " ".join(words[letter] for letter in row.site.roles)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
