"""`lora-jax inspect`: what a PEFT adapter directory holds, layer by layer."""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import products
from lora_jax.cli._adapter import Adapter, LowRank, read_adapter
from lora_jax.cli._heat_map import write_heat_map
from lora_jax.cli._show import by, console, finite, natural


@dataclass(frozen=True)
class ModuleStats:
    """One row of the table. Norms are Frobenius norms; `singular_values` are those of s B A, all of them."""

    module: str
    kind: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    rank: int
    alpha: float
    scaling: float
    norm_a: float
    norm_b: float
    norm_delta: float
    singular_values: tuple[float, ...]
    effective_rank: float
    parameters: int


def inspect(adapter_dir: str, *, top: int = 3, json: bool = False, png: str | None = None) -> None:
    """Show what a PEFT LoRA adapter directory holds, layer by layer.

    Args:
        adapter_dir: Directory with adapter_config.json and adapter_model.safetensors.
        top: How many singular values of the update s*B*A to show per module.
        json: Print JSON, with every singular value, instead of tables.
        png: Also write a heat map of the updates' norms, layers by module types, to this file.
    """
    if top < 0:
        raise ValueError(f"--top {top}: the number of singular values to show cannot be negative.")
    adapter = read_adapter(adapter_dir)
    rows = [
        module_stats(name, factors)
        for name, factors in sorted(adapter.modules.items(), key=lambda item: natural(item[0]))
    ]
    if png is not None:
        write_heat_map({row.module: row.norm_delta for row in rows}, Path(png))
    if json:
        print(json_module.dumps(_as_json(adapter, rows), indent=2, allow_nan=False))
    else:
        _print_tables(adapter, rows, top)


def module_stats(name: str, factors: LowRank) -> ModuleStats:
    """Norms and singular values of one module's update, from r x r matrices: B A is never formed."""
    b, a = factors.matrices()
    values = abs(factors.scaling) * products.singular_values(b, a)
    parameters = factors.a.size + factors.b.size + (0 if factors.bias is None else factors.bias.size)
    return ModuleStats(
        name,
        factors.kind,
        factors.a.shape,
        factors.b.shape,
        factors.rank,
        factors.alpha,
        factors.scaling,
        float(np.linalg.norm(a)),
        float(np.linalg.norm(factors.b.astype(np.float64))),
        factors.norm(),
        tuple(map(float, values)),
        products.effective_rank(values),
        parameters,
    )


def _totals(adapter: Adapter, rows: Sequence[ModuleStats]) -> dict[str, Any]:
    return {
        "modules": len(rows),
        "low_rank_parameters": sum(row.parameters for row in rows),
        "other_parameters": sum(v.size for v in (*adapter.replaced.values(), *adapter.others.values())),
        "norm_delta": math.sqrt(sum(row.norm_delta**2 for row in rows)),
    }


def _other_tensors(adapter: Adapter) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(value.shape), "norm": float(np.linalg.norm(value.astype(np.float64)))}
        for name, value in sorted({**adapter.replaced, **adapter.others}.items(), key=lambda item: natural(item[0]))
    ]


def _as_json(adapter: Adapter, rows: Sequence[ModuleStats]) -> dict[str, Any]:
    return finite(
        {
            "directory": str(adapter.directory),
            "config": adapter.config,
            "modules": [asdict(row) for row in rows],
            "other_tensors": _other_tensors(adapter),
            "totals": _totals(adapter, rows),
            "notes": _notes(adapter, rows),
        }
    )


def _notes(adapter: Adapter, rows: Sequence[ModuleStats]) -> list[str]:
    notes = []
    broken = [row.module for row in rows if not math.isfinite(row.norm_delta)]
    if broken:
        notes.append(f"NaN or infinite factors in {', '.join(broken)}")
    idle = [row.module for row in rows if row.norm_delta == 0]
    if idle:
        notes.append(f"{len(idle)} of {len(rows)} modules change nothing (their update is zero)")
    if adapter.config.get("use_dora"):
        notes.append("DoRA: the norms are of s·B·A alone, without the magnitudes")
    return notes


def _print_tables(adapter: Adapter, rows: Sequence[ModuleStats], top: int) -> None:
    from rich.table import Table

    config = adapter.config
    shown = [k for k in ("base_model_name_or_path", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias")]
    out = console()
    out.print(str(adapter.directory), style="bold")
    out.print("  ".join(f"{k}={config[k]}" for k in shown if config.get(k) is not None))
    table = Table()
    table.add_column("module", no_wrap=True)
    for name in ("type", "A", "B"):
        table.add_column(name, no_wrap=True)
    for name in ("rank", "alpha", "scaling", "‖A‖", "‖B‖", "‖s·BA‖", f"top {top} σ", "eff. rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = [f"{n:.4g}" for n in (row.alpha, row.scaling, row.norm_a, row.norm_b, row.norm_delta)]
        values = " ".join(f"{s:.3g}" for s in row.singular_values[:top])
        shapes = [by(row.shape_a), by(row.shape_b)]
        table.add_row(row.module, row.kind, *shapes, str(row.rank), *numbers, values, f"{row.effective_rank:.2f}")
    out.print(table)
    for other in _other_tensors(adapter):
        out.print(f"also {other['name']} {by(other['shape'])}, norm {other['norm']:.4g}")
    totals = _totals(adapter, rows)
    out.print(
        f"{totals['modules']} modules, {totals['low_rank_parameters']:,} parameters in factors, "
        f"{totals['other_parameters']:,} in other tensors, ‖s·BA‖ over all {totals['norm_delta']:.4g}",
    )
    for note in _notes(adapter, rows):
        out.print(f"note: {note}", style="yellow")
