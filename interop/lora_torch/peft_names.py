"""Which PyTorch modules an adapted Flax parameter becomes, read from its roles and the name table.

The table (`lora_torch.naming`) knows names and which axes are split; the site knows which axes are in, out and
stacked. Both together leave nothing to guess, except where a stack of layers is numbered: an unstated stack takes
its number after the last part of its path that is called like a list of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_jax.sites import Atom, Site

from .arrays import shape_dtype
from .layouts import Layout
from .naming import TENSOR_NAMES, Naming, Path, Target
from .patterns import Pattern
from .peft_tensors import Placement
from .problems import Problems
from .resolve import Entry, resolve
from .trees import Leaf

# What lists of layers are called; only there is an unstated stack numbered by itself.
LAYER_LISTS = ("layers", "layer", "h", "blocks", "block")

Names = Naming | Mapping[str, str] | str | None


def as_naming(names: Names) -> Naming:
    """A `Naming` from a preset's name or a table of renames; None is linen's, `layers_0` -> `layers.0`."""
    if isinstance(names, Naming):
        return names
    if isinstance(names, str):
        return Naming(preset=names)
    return Naming(preset="linen", names=dict(names or {}))


def places(
    sites: Sequence[Site], naming: Naming, tied: Mapping[str, str] | None = None, paths: Sequence[Path] | None = None
) -> list[Placement]:
    """Where each low-rank site goes.

    **Arguments:** `tied`, {alias: source} of tensor names, as for state dicts; `paths`, of all the model's parameters
    where they are known, so that a rule that touches none of them is an error.

    **Raises:** `ValueError` listing every site that cannot be placed and what to pass.
    """
    problems: list[str] = []
    if paths is not None:
        problems += naming.unused([_bare(path) for path in paths])
    found = place_each(sites, naming)
    problems += [x for x in found.values() if isinstance(x, str)]
    out = [x for x in found.values() if isinstance(x, Placement)]
    out = _with_heads(out, tied or {}, problems)
    owners: dict[str, str] = {}
    for place in out:
        for name in (*place.names, *place.heads):
            if owners.setdefault(name, place.site.name) != place.site.name:
                problems.append(f"`{place.site.name}` and `{owners[name]}` both become `{name}`; rename one")
    if problems:
        raise ValueError("the adapter cannot be named in PyTorch:\n" + "\n".join(f"  {p}" for p in problems))
    return out


def place_each(sites: Sequence[Site], naming: Naming) -> dict[Path, Placement | str]:
    """Where each low-rank site goes by its path, or why it has no place."""
    naming = with_stacks(sites, naming)
    out: dict[Path, Placement | str] = {}
    for site in sites:
        if site.is_low_rank:
            try:
                out[site.path] = _place(site, naming)
            except ValueError as error:
                out[site.path] = str(error)
    return out


def place_table(site: Site, naming: Naming, sites: Sequence[Site]) -> Placement:
    """Where a table goes whose rows are trained. **Raises:** `ValueError` if it has no one module."""
    place = _place(site, with_stacks(sites, naming))
    if place.kind != "embedding" or len(place.names) != 1:
        raise ValueError(f"`{site.name}`: PEFT trains rows of embeddings only, and this is {', '.join(place.names)}.")
    return place


def full_entries(sites: Sequence[Site], naming: Naming, values: Mapping[tuple[str, ...], Any]) -> list[Entry]:
    """Names and layouts of the parameters trained in full; `values` are arrays or shapes by the site's path.

    **Raises:** `StateDictError` naming each whose layout is not known.
    """
    naming = with_stacks(sites, naming)
    problems = Problems()
    leaves = [Leaf(torch_path(s), values[s.path], *shape_dtype(values[s.path])) for s in sites if s.is_full]
    entries = resolve(leaves, naming, None, problems) if leaves else []
    # Only these leaves were looked at: what the caller states about others is not unused.
    unused = set(naming.unused([leaf.path for leaf in leaves]))
    problems.other = [text for text in problems.other if text not in unused]
    problems.raise_if_any()
    return entries


def torch_path(site: Site) -> Path:
    """The path without the collection of a linen variables dict."""
    return _bare(site.path)


def _bare(path: Path) -> Path:
    return path[1:] if path[0] == "params" and len(path) > 1 else path


def fan_in_fan_out(sites: Sequence[Site], naming: Naming) -> bool:
    """Whether the table says that a torch layer stores (in, out), as GPT-2's Conv1D."""
    naming = with_stacks(sites, naming)
    for site in sites:
        target = naming.target(torch_path(site), len(site.shape))
        if site.op == "linear" and len(target.layouts) == 1 and target.names[0].endswith(".weight"):
            groups = [_roles(site, target, target.layouts[0], axis) for axis in target.layouts[0].right]
            if groups == [{"i"}, {"o"}]:
                return True
    return False


def with_stacks(sites: Sequence[Site], naming: Naming) -> Naming:
    """`naming` with the stacks that the sites' roles show and the caller has not stated."""
    stacks = dict(naming.stacks) if isinstance(naming.stacks, Mapping) else dict.fromkeys(_listed(naming.stacks), 0)
    known = [Pattern(prefix) for prefix in stacks]
    for site in sites:
        if site.is_full:
            continue
        path = torch_path(site)
        axes = _unsplit(site, naming.target(path, len(site.shape)))
        if site.op == "experts":
            axes = axes[:-1]
        lists = [n for n, part in enumerate(path[:-1]) if part in LAYER_LISTS and not path[n + 1].isdigit()]
        if len(axes) != 1 or not lists:
            continue
        prefix = ".".join(path[: lists[-1] + 1])
        if not any(pattern.match(prefix) is not None for pattern in known):
            stacks[prefix] = axes[0]
    return replace(naming, stacks=stacks)


def _listed(stacks: Sequence[str] | Mapping[str, int]) -> Sequence[str]:
    return (stacks,) if isinstance(stacks, str) else tuple(stacks)


def _unsplit(site: Site, target: Target) -> list[int]:
    """Lead axes of a site that its target leaves inside one tensor."""
    split: tuple[int, ...] = target.stack_axes
    try:
        bound = target.layouts[0].bind(site.shape, target.stack_axes)
        split = bound.order[: len(bound.split_shape)]
    except (IndexError, ValueError):
        pass  # no layout of so many axes: `_place` says so
    return [atom.axis for atom in site.atoms_of("l") if atom.axis not in split]


def _roles(site: Site, target: Target, layout: Layout, group: tuple[str, ...]) -> set[str]:
    """The roles of the site's axes that one torch axis is made of."""
    axes = {axis for name in group for axis in _positions(site, target, layout, name)}
    return {role for atom, role in zip(site.atoms, site.roles, strict=True) if atom.axis in axes}


def _positions(site: Site, target: Target, layout: Layout, name: str) -> list[int]:
    """Positions in the parameter of an axis (or run of axes) that a layout names."""
    run = len(site.shape) - len(target.stack_axes) - sum(axis != "..." for axis in layout.left)
    left: list[str] = []
    for axis in layout.left:
        left += [axis] * (run if axis == "..." else 1)
    for axis in reversed(target.stack_axes):
        left.insert(axis, " stack")
    return [n for n, axis in enumerate(left) if axis == name]


def _place(site: Site, naming: Naming) -> Placement:
    path = torch_path(site)
    target = naming.target(path, len(site.shape))
    if target.part is not None:
        raise ValueError(
            f"`{site.name}` is only a part of `{target.names[0]}`; PEFT adapts whole tensors. Leave it out."
        )
    if site.op == "conv" and site.kernel_spec is None:
        raise ValueError(
            f"`{site.name}`: this convolution reads a reshaped kernel or is a transposed convolution, which PEFT "
            "cannot adapt; leave it out."
        )
    layouts = [layout for layout in target.layouts if _accepts(site, target, layout)]
    if not layouts:
        raise ValueError(
            f"`{site.name}` {site.shape} has roles {site.roles}, which fits none of the layouts "
            f"{[layout.spec for layout in target.layouts]}; state one: `Naming(layouts={{'{'.'.join(path)}': …}})`"
        )
    expanded = [target.expand(layout, site.shape) for layout in layouts]
    if any(names != expanded[0] for names in expanded):
        raise ValueError(f"`{site.name}` {site.shape}: state which layout splits it, {[x.spec for x in layouts]}")
    layout = layouts[0]
    if layout.reversed_axes:
        raise ValueError(f"`{site.name}` is a transposed convolution, which PEFT cannot adapt; leave it out.")
    bound = layout.bind(site.shape, target.stack_axes)
    split = tuple(_whole(site, axis) for axis in bound.order[: len(bound.split_shape)])
    # One layout gives torch's order of merged axes; where several are possible all of them are row-major.
    order = bound.order if len(layouts) == 1 else range(len(site.shape))
    tensors = list(expanded[0])
    raw = [name.rpartition(".")[2] not in TENSOR_NAMES for name in tensors]
    kept = [atom for atom in site.atoms_of("l") if atom not in split]
    kind = "parameter" if any(raw) else site.op if site.op in ("conv", "embedding") else "linear"
    if kept and (kind != "parameter" or site.op != "experts" or len(kept) > 1):
        sizes = ", ".join(f"axis {atom.axis} of length {atom.size}" for atom in kept)
        raise ValueError(
            f"`{site.name}` {site.shape} stacks weights along {sizes}: say what each is called, by "
            f"`Naming(stacks=({'.'.join(path[:-2]) or path[0]!r},))` for layers, or by "
            f"`Naming(rules=[Rule({'.'.join(path)!r}, to=(name, name, …), layout='s i o -> o i')])`"
        )
    if kind == "parameter" and site.op in ("conv", "embedding"):
        raise ValueError(
            f"`{site.name}` would be the raw parameter `{tensors[0]}`; name its module, "
            f"`names={{'{'.'.join(path)}': '….weight'}}`"
        )
    inner = _ordered(site, "i", order, split)
    outer = _ordered(site, "o", order, split)
    if kind == "conv":
        inner, outer = _conv_order(site), tuple(a for a in outer if a.axis == site.kernel_spec[0])  # type: ignore[index]
    names = tuple(name if kind == "parameter" else name.rpartition(".")[0] for name in tensors)
    return Placement(site, names, kind, split, inner, outer)


def _accepts(site: Site, target: Target, layout: Layout) -> bool:
    """Whether a layout keeps in and out axes on torch axes of their own, and splits no in axis."""
    groups = [_roles(site, target, layout, group) for group in layout.right if group != ("...",)]
    if ("...",) in layout.right and site.op != "conv":
        groups += [
            {role for atom, role in zip(site.atoms, site.roles, strict=True) if atom.axis == axis}
            for axis in _positions(site, target, layout, "...")
        ]
    split = set().union(*(_roles(site, target, layout, (name,)) for name in layout.split), set())
    return all(len(group) <= 1 for group in groups) and "i" not in split


def _whole(site: Site, axis: int) -> Atom:
    atoms = [atom for atom in site.atoms if atom.axis == axis]
    if len(atoms) != 1:
        raise ValueError(f"`{site.name}`: axis {axis} cannot be split, since the model cuts it into parts")
    return atoms[0]


def _ordered(site: Site, role: str, order: Any, split: tuple[Atom, ...]) -> tuple[Atom, ...]:
    own = [atom for atom in site.atoms_of(role) if atom not in split]
    return tuple(sorted(own, key=lambda atom: (list(order).index(atom.axis), -atom.stride)))


def _conv_order(site: Site) -> tuple[Atom, ...]:
    """The in axes as PyTorch orders them: channels, then the window."""
    assert site.kernel_spec is not None
    by_axis = {atom.axis: atom for atom in site.atoms_of("i")}
    return tuple(by_axis[axis] for axis in site.kernel_spec[1:])


def _with_heads(out: list[Placement], tied: Mapping[str, str], problems: list[str]) -> list[Placement]:
    """Adds the linear heads that share an embedding's table."""
    tables = {name: n for n, place in enumerate(out) if place.kind == "embedding" for name in place.names}
    for alias, source in tied.items():
        if (module := source.rpartition(".")[0]) in tables:
            n = tables[module]
            out[n] = replace(out[n], heads=(*out[n].heads, alias.rpartition(".")[0]))
    for place in out:
        if len(place.heads) > 1:
            problems.append(several_aliases(f"{place.names[0]}.weight", [f"{head}.weight" for head in place.heads]))
        if place.site.tied and place.kind != "embedding":
            problems.append(
                f"`{place.site.name}` is used from both sides, and PEFT can adapt only one of them; leave it out."
            )
        elif place.site.tied and not place.heads:
            problems.append(
                f"`{place.site.name}` is also the model's output head, which this adapter changes as well: say the "
                f"head's name, `tied={{'lm_head.weight': '{place.names[0]}.weight'}}`"
            )
    return out


def several_aliases(table: str, aliases: Iterable[str]) -> str:
    """Why a table that more than one other module shares cannot be adapted in PEFT."""
    return (
        f"`{table}` is also called {', '.join(aliases)}: PEFT adapts a shared module under its first name only and "
        "leaves the other lookups the base's; leave this table out."
    )
