"""Trained rows of embedding tables (`trainable_token_indices`) as tensors of a PEFT file, and back.

PEFT calls them deltas, but stores the rows themselves, (row, features). A head that is tied to the table has no tensor
of its own: PEFT's model shares the rows, as long as its configuration says that the two are tied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.sites import TOKENS, Site

from .arrays import convert
from .naming import Naming
from .peft_keys import PREFIX
from .peft_names import place_table
from .peft_read import DELTA, AdapterFile
from .peft_tensors import Placement, take

ROW = "row"


def token_tensors(adapter: Adapter, naming: Naming) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """`{key: (row, features)}` and PEFT's `trainable_token_indices`. **Raises** `ValueError` for what is no table."""
    tensors, indices = {}, {}
    for site in adapter.sites:
        if site.tokens:
            place = place_table(site, naming, adapter.sites)
            rows = convert(adapter.leaf(site.leaf_path(TOKENS)), "numpy")
            rows = take(rows, (ROW, *site.atoms_of("o")), {}, (ROW, *place.outer)).reshape(len(site.tokens), -1)
            tensors[f"{PREFIX}{place.names[0]}.token_adapter.{DELTA}"] = rows
            indices[place.names[0]] = site.tokens
    return tensors, indices


def token_leaves(file: AdapterFile, sites: Sequence[Site], naming: Naming) -> dict[tuple[str, ...], np.ndarray]:
    """The leaves of the sites of rows; whatever does not fit is noted in `file.problems`."""
    out: dict[tuple[str, ...], np.ndarray] = {}
    stored = {module: extras[DELTA] for module, extras in file.extras.items() if DELTA in extras}
    for site in sites:
        if site.tokens:
            place = place_table(site, naming, sites)
            rows, said = stored.pop(place.names[0], None), indices_of(file, place.names[0])
            if rows is None:
                file.problems.append(f"missing: {PREFIX}{place.names[0]}.token_adapter.{DELTA}, for `{site.name}`")
            elif rows.shape != (len(site.tokens), site.fan_out) or said != site.tokens:
                file.problems.append(
                    f"{place.names[0]}: the file trains rows {list(said)} and has {rows.shape}, the plan trains "
                    f"{list(site.tokens)} of {site.fan_out} features"
                )
            else:
                out[site.leaf_path(TOKENS)] = _inward(site, place, rows)
    file.problems += [f"unexpected: {PREFIX}{module}.token_adapter.{DELTA} is not in the plan" for module in stored]
    return out


def indices_of(file: AdapterFile, module: str) -> tuple[int, ...]:
    """Which rows of a module the configuration says are stored; none if it names others only."""
    said: Any = file.config.get("trainable_token_indices") or ()
    if isinstance(said, Mapping):
        said = next((rows for name, rows in said.items() if f".{module}".endswith(f".{name}")), ())
    return tuple(said)


def planned_tokens(file: AdapterFile, places: Mapping[Any, Placement | str]) -> dict[str, tuple[int, ...]]:
    """`{parameter: rows}` for a configuration here, from the tables of a file that the model has."""
    modules = [module for module, extras in file.extras.items() if DELTA in extras]
    tables = {p.names[0]: p.site.name for p in places.values() if isinstance(p, Placement) and p.kind == "embedding"}
    return {tables[module]: indices_of(file, module) for module in modules if module in tables}


def _inward(site: Site, place: Placement, rows: np.ndarray) -> np.ndarray:
    sizes = [atom.size for atom in place.outer]
    return take(rows.reshape(len(rows), *sizes), (ROW, *place.outer), {}, (ROW, *site.atoms_of("o")))
