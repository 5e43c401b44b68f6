"""Parameters trained in full (`modules_to_save`) as whole tensors of a PEFT file.

PEFT copies modules one by one. A copy of an embedding's table leaves the head that is tied to it at the base's values,
while here one table is both: the head gets a copy of its own, and a file without that copy says something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.sites import Site

from .arrays import convert, ops_of, same_bits
from .naming import Naming
from .peft_keys import PREFIX
from .peft_names import full_entries, several_aliases, torch_path
from .peft_read import AdapterFile
from .resolve import Entry


def full_tensors(adapter: Adapter, naming: Naming, tied: Mapping[str, str] | None) -> dict[str, np.ndarray]:
    """Tensors of what is trained in full, by torch name. **Raises** `ValueError` for those PEFT cannot hold."""
    values = {site.path: convert(adapter.leaf(site.path), "numpy") for site in adapter.sites if site.is_full}
    entries = full_entries(adapter.sites, naming, values)
    aliases, problems = full_aliases(adapter.sites, entries, tied)
    problems += [
        f"`{entry.leaf}` is only a part of `{entry.names[0]}`, which PEFT saves as a whole."
        for entry in entries
        if entry.part is not None
    ]
    if problems:
        raise ValueError("what is trained in full cannot be saved for PEFT:\n" + "\n".join(f"  {p}" for p in problems))
    out: dict[str, np.ndarray] = {}
    for entry in entries:
        out |= zip(entry.names, entry.layout.to_torch(entry.leaf.value, ops_of("numpy")), strict=True)
    return out | {alias: out[source] for alias, source in aliases.items()}


def lone_biases(full: Iterable[str]) -> list[str]:
    """The tensors of `full` that are biases trained without the rest of their module, as by PEFT's `bias`."""
    names = set(full)
    return [n for n in full if n.endswith(".bias") and f"{n.removesuffix('.bias')}.weight" not in names]


def check_whole(full: Sequence[str], others: Sequence[str]) -> None:
    """Raises a `ValueError` unless every module of `full` is trained in full with all that is in it.

    **Arguments:** `others`, modules that are adapted otherwise or not at all, stacked ones with `{i}` for the index.
    """
    problems = []
    for module in full:
        if not module:
            problems.append("a parameter of the model itself is trained in full, and PEFT copies its submodules only")
        inside = [name for name in others if _is_inside(name, module)]
        if module and inside:
            problems.append(
                f"`{module}` is copied as a whole, but only a part of it is trained in full, not "
                f"{', '.join(inside[:3])}: name the module in `modules_to_save`, or leave its parameters out"
            )
    if problems:
        raise ValueError("what is trained in full cannot be saved for PEFT:\n" + "\n".join(f"  {p}" for p in problems))


def _is_inside(name: str, module: str) -> bool:
    parts = zip(name.split("."), module.split("."), strict=False)
    return name.count(".") >= module.count(".") and all(n == m or (n.startswith("{") and m.isdigit()) for n, m in parts)


def full_aliases(
    sites: Sequence[Site], entries: Sequence[Entry], tied: Mapping[str, str] | None
) -> tuple[dict[str, str], list[str]]:
    """`{head's tensor: table's tensor}` of the tied tables among `entries`, and what is wrong with `tied`."""
    is_tied = {torch_path(site): site.tied for site in sites if site.is_full}
    out: dict[str, str] = {}
    problems = []
    for entry in entries:
        own = {alias: source for alias, source in (tied or {}).items() if source in entry.names}
        if is_tied[entry.leaf.path] and not own:
            problems.append(
                f"`{entry.leaf}` is also the model's output head, which its copy changes as well: say the head's name, "
                f"`tied={{'lm_head.weight': '{entry.names[0]}'}}`"
            )
        if len(own) > 1:
            problems.append(several_aliases(entry.names[0], own))
        out |= own
    return out, problems


def match_aliases(
    file: AdapterFile, sites: Sequence[Site], entries: Sequence[Entry], tied: Mapping[str, str] | None
) -> None:
    """Takes the copies of tied heads out of `file.full`; notes those that are missing or not the table's."""
    aliases, problems = full_aliases(sites, entries, tied)
    file.problems += problems
    for alias, source in aliases.items():
        copy, table = file.full.pop(alias, None), file.full.get(source)
        if copy is None and table is not None:
            file.problems.append(
                f"missing: {PREFIX}{alias}. It is the same table as {source} here; PEFT trained a copy for the lookup "
                "alone, which has no form here"
            )
        elif copy is not None and table is not None and not same_bits(copy, table):
            file.problems.append(f"{alias} and {source} are one weight here, but the file trains them apart")
