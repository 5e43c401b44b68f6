"""The tables of a run: the plan, the memory, the results."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import numpy as np

from lora_jax.cli._show import by, console
from lora_jax.cli.training.jobs import Job
from lora_jax.cli.training.learners import Learner
from lora_jax.planning import Plan
from lora_jax.rows import Row


def show_plan(plan: Plan) -> None:
    """The adapted parameters, layers of one kind in one line; why the others are left out; PEFT's count."""
    from rich.table import Table

    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in plan.rows:
        if row.site is not None:
            name = ".".join("*" if part.isdecimal() else re.sub(r"_\d+$", "_*", part) for part in row.path)
            groups.setdefault((name, row.shape, row.site.rank, row.site.alpha), []).append(row)
    table = Table()
    for name, justify in (("adapted", "left"), ("×", "right"), ("op", "left"), ("roles", "left"), ("shape", "left"),
                          ("rank", "right"), ("scale", "right"), ("parameters", "right")):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "adapted")  # type: ignore[arg-type]
    for (name, shape, rank, _), rows in groups.items():
        site = rows[0].site
        assert site is not None
        words = " ".join({"l": "lead", "i": "in", "o": "out"}[letter] for letter in site.roles)
        low = [str(rank), f"{site.scale:.4g}"] if not site.is_full else ["full", ""]
        size = sum(r.site.parameters for r in rows if r.site is not None)
        table.add_row(name, str(len(rows)), site.op, words, by(shape), *low, f"{size:,}")
    out = console()
    out.print(table)
    reasons = Counter(row.note for row in plan.rows if row.site is None)
    left_out = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    out.print(f"left out: {sum(reasons.values())} of {len(plan.rows)} parameters ({left_out})")
    for name, primitive, shape in plan.materialised:
        out.print(f"formed in full at every call: {name} {by(shape)}, by {primitive}")
    out.print(plan.summary())


def show_memory(learner: Learner, job: Job, batch: Any) -> None:
    """What XLA plans for one training step, and what of it is whose."""
    from rich.table import Table

    planned = learner.compiled_step(batch).memory_analysis()
    table = Table("memory of one step", "MB")
    table.columns[1].justify = "right"
    parts = {
        "base parameters (frozen)": size_of(job.base.params),
        "adapter": size_of(learner.adapter),
        "optimizer state": size_of(learner.state()),
        "one batch": size_of(batch),
    }
    for name, size in parts.items():
        table.add_row(name, _megabytes(size))
    out = console()
    if planned is not None:  # some backends do not tell
        kept = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
        table.add_row("XLA: arguments and results", _megabytes(kept), end_section=False)
        table.add_row("XLA: activations, gradients, scratch", _megabytes(planned.temp_size_in_bytes))
        table.add_row("XLA: program", _megabytes(planned.generated_code_size_in_bytes))
        table.add_row("estimated peak", _megabytes(kept + planned.temp_size_in_bytes), style="bold")
    out.print(table)


def show_results(results: dict[str, dict[str, Any]]) -> None:
    """One line per model: its metrics on the held-out rows."""
    from rich.table import Table

    names = list(next(iter(results.values())))
    table = Table("on the held-out rows", *names)
    for column in table.columns[1:]:
        column.justify = "right"
    for model, metrics in results.items():
        table.add_row(model, *(format_metric(name, metrics[name]) for name in names))
    console().print(table)


def format_metric(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.4g}"


def size_of(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(int(np.prod(np.shape(x))) * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in jax.tree.leaves(tree))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f}"
