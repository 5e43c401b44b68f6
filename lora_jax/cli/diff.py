"""`lora-jax diff`: how far two PEFT adapters are apart, module by module."""

from __future__ import annotations

import json as json_module
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora_jax.cli._adapter import Adapter, LowRank, read_adapter
from lora_jax.cli._show import console, finite, natural
from lora_jax.comparing import difference, in_total, ratio


@dataclass(frozen=True)
class ModuleDiff:
    """Two updates D1 = s1 B1 A1 and D2 of one module.

    `cosine` is <D1, D2> / (||D1|| ||D2||), NaN if one is zero. `relative` is ||D1 - D2|| / ||D1||: 0 if both
    are zero, infinite if only D1 is. `angle_in` and `angle_out` are the largest principal angles, in degrees, between
    what the two read and what they write; NaN if one is zero. Where the modules' shapes differ nothing is computed and
    `note` says so.
    """

    module: str
    rank1: int
    rank2: int
    norm1: float
    norm2: float
    cosine: float
    relative: float
    angle_in: float = math.nan
    angle_out: float = math.nan
    note: str = ""


def diff(dir1: str, dir2: str, *, json: bool = False) -> None:
    """Compare two PEFT LoRA adapter directories, module by module.

    Args:
        dir1: The first adapter directory; relative differences are relative to it.
        dir2: The second adapter directory.
        json: Print JSON instead of tables.
    """
    first, second = read_adapter(dir1), read_adapter(dir2)
    result = compare(first, second)
    if json:
        print(json_module.dumps(finite(result), indent=2, allow_nan=False))
    else:
        _print_tables(first, second, result)


def compare(first: Adapter, second: Adapter) -> dict[str, Any]:
    """Everything that differs, as plain data.

    "total" is the cosine and relative difference of all common modules taken as one vector.
    """
    common = sorted(first.modules.keys() & second.modules.keys(), key=natural)
    rows = [module_diff(name, first.modules[name], second.modules[name]) for name in common]
    names1, names2 = _tensor_names(first), _tensor_names(second)
    return {
        "first": str(first.directory),
        "second": str(second.directory),
        "config": _config_differences(first.config, second.config),
        "modules": [asdict(row) for row in rows],
        "total": _total(rows),
        "other_tensors": _other_differences(first, second),
        "only_in_first": sorted(names1 - names2),
        "only_in_second": sorted(names2 - names1),
    }


def module_diff(name: str, one: LowRank, two: LowRank) -> ModuleDiff:
    """Compares two updates of one module from their factors; neither product is formed."""
    norm1, norm2 = one.norm(), two.norm()
    if one.kind != two.kind or one.a.shape[1:] != two.a.shape[1:] or one.b.shape[0] != two.b.shape[0]:
        note = f"{one.kind} A {one.a.shape} B {one.b.shape} against {two.kind} A {two.a.shape} B {two.b.shape}"
        return ModuleDiff(name, one.rank, two.rank, norm1, norm2, math.nan, math.nan, note=note)
    (b1, a1), (b2, a2) = one.matrices(), two.matrices()
    found = difference(name, (a1.T, one.scaling * b1.T), (a2.T, two.scaling * b2.T))
    inward, outward = (math.degrees(a[0]) if a.size else math.nan for a in (found.angles_in, found.angles_out))
    return ModuleDiff(name, one.rank, two.rank, norm1, norm2, found.cosine, found.relative, inward, outward)


def _total(rows: list[ModuleDiff]) -> dict[str, float]:
    cosine, relative = in_total([((row.norm1, row.norm2), row.cosine, row.relative) for row in rows if not row.note])
    return {"cosine": cosine, "relative": relative}


def _tensor_names(adapter: Adapter) -> set[str]:
    return {*adapter.modules, *adapter.replaced, *adapter.others}


def _config_differences(one: dict[str, Any], two: dict[str, Any]) -> dict[str, list[Any]]:
    """{key: [first, second]}. An absent key equals an empty value: writers differ in what they spell out."""

    def plain(key: str, value: Any) -> Any:
        if key in ("target_modules", "exclude_modules", "modules_to_save") and isinstance(value, list):
            value = sorted(value)  # PEFT keeps these as sets
        return value or None

    keys = sorted(one.keys() | two.keys())
    pairs = {key: [one.get(key), two.get(key)] for key in keys}
    return {key: pair for key, pair in pairs.items() if plain(key, pair[0]) != plain(key, pair[1])}


def _other_differences(first: Adapter, second: Adapter) -> list[dict[str, Any]]:
    """Full tensors present in both: ||T1 - T2|| / ||T1||, or a note where the shapes differ."""
    one, two = {**first.replaced, **first.others}, {**second.replaced, **second.others}
    out = []
    for name in sorted(one.keys() & two.keys()):
        t1, t2 = one[name].astype(np.float64), two[name].astype(np.float64)
        if t1.shape != t2.shape:
            out.append({"name": name, "relative": math.nan, "note": f"{t1.shape} against {t2.shape}"})
            continue
        gap, size = float(np.linalg.norm(t1 - t2)), float(np.linalg.norm(t1))
        out.append({"name": name, "relative": ratio(gap, size, 0.0 if gap == 0 else math.inf), "note": ""})
    return out


def _print_tables(first: Adapter, second: Adapter, result: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    out.print(f"1: {first.directory}\n2: {second.directory}", style="bold")
    for key, (one, two) in result["config"].items():
        out.print(f"config {key}: {one!r} | {two!r}")
    table = Table()
    table.add_column("module", no_wrap=True)
    for name in ("ranks", "‖ΔW₁‖", "‖ΔW₂‖", "cosine", "‖ΔW₁−ΔW₂‖/‖ΔW₁‖"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["modules"]:
        numbers = [f"{row[k]:.4g}" for k in ("norm1", "norm2")]
        numbers += [row["note"], ""] if row["note"] else [f"{row['cosine']:.6f}", f"{row['relative']:.3g}"]
        table.add_row(row["module"], f"{row['rank1']} {row['rank2']}", *numbers)
    out.print(table)
    for other in result["other_tensors"]:
        told = other["note"] or f"relative difference {other['relative']:.3g}"
        out.print(f"also {other['name']}: {told}")
    for number, key in ((1, "only_in_first"), (2, "only_in_second")):
        for name in result[key]:
            out.print(f"only in {number}: {name}")
    total = result["total"]
    out.print(
        f"{len(result['modules'])} common modules: cosine {total['cosine']:.6f}, "
        f"relative difference {total['relative']:.3g}",
    )
