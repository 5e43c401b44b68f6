"""The measured tables of `docs/kernels.md`, from the lines that `kernels.py` and `groups.py` wrote.

    python benchmarks/kernels_table.py --write docs/kernels.md

Reads `kernels.jsonl`, `triton.jsonl`, `torch_lora.jsonl`, `groups.jsonl` and `train_step.jsonl` in
`benchmarks/results`; of a row measured more than once, the last. Without `--write`, prints the tables.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.pages import RESULTS, Row, aligned, lines, of_last_commit, renew  # noqa: E402

BEGIN, END = "<!-- tables: benchmarks/kernels_table.py -->\n", "<!-- end of tables -->"
# Rows of `torch_lora.jsonl`.
TORCH = (
    "peft",
    "torch.compile",
    "addmm function",
    "NeMo Automodel",
    "TritonLinearLoRA",
    "TritonLinearLoRA, x @ A kept",
)
# Column heading -> (pass, row).
COLUMNS = {
    "XLA LoRA, forward": ("forward", "XLA LoRA"),
    "kernels, forward": ("forward", "kernels"),
    "XLA LoRA, f + b": ("forward + backward", "XLA LoRA"),
    "kernels, f + b": ("forward + backward", "kernels"),
    "XLA LoRA, f + b, dropout": ("forward + backward", "XLA LoRA, dropout"),
    "kernels, f + b, dropout": ("forward + backward", "kernels, dropout"),
}


def read(path: Path) -> list[Row]:
    """The last measurement of each row, in the order of the first. Of what kernels took then, another commit's rows of
    a pass that was measured again tell nothing."""
    rows = lines(path)
    last = {(shape_of(row), row["pass"]): row["commit"] for row in rows}
    rows = [row for row in rows if last[shape_of(row), row["pass"]] == row["commit"]]
    return list({(shape_of(row), row["pass"], row["row"]): row for row in rows}.values())


def shape_of(row: Row) -> tuple[Any, ...]:
    """M, K, N and R; of several products, all N."""
    found = (row.get(name, 0) for name in "mknr")
    return tuple(tuple(size) if isinstance(size, list) else size for size in found)


def source(rows: list[Row]) -> str:
    """On what, with what and when: once for each combination."""
    found = dict.fromkeys("{gpu}, jax {jax}, commit {commit}, {date}".format(**row) for row in rows)
    return "Measured on " + "; ".join(found) + ".\n"


def measured_by(rows: list[Row]) -> str:
    return "; ".join(dict.fromkeys("{gpu}, commit {commit}".format(**row) for row in rows))


def ratios(rows: list[Row], *, others: bool) -> str:
    """One line a shape: those with lines of each kernel alone, and their geometric means; or `others`."""
    by = {(shape_of(row), row["pass"], row["row"]): row for row in rows}
    whole = {shape_of(row) for row in rows if row["pass"] == "alone"}
    shapes = [s for s in dict.fromkeys(map(shape_of, rows)) if (s not in whole) == others]
    shapes = sorted(shapes, key=lambda s: (*s[1:], s[0])) if others else shapes
    lines, columns = [], {name: [] for name in COLUMNS}
    for shape in shapes:
        base = [by.get((shape, each, "XLA frozen")) for each in ("forward", "forward + backward")]
        cells = ["{}, {}, {}, {}".format(*shape), " / ".join(f"{row['median_us']:.0f}" if row else "" for row in base)]
        for name, key in COLUMNS.items():
            row = by.get((shape, *key))
            if row:
                columns[name].append(row["ratio"])
            cells.append("{:.3f} ({:.3f} to {:.3f})".format(row["ratio"], *row["ratio_spread"]) if row else "")
        if others:
            cells.insert(1, "{}, {}".format(base[1]["gpu"].split()[1], base[1]["commit"]) if base[1] else "")
        lines.append(cells)
    if not others and len(shapes) > 1:
        means = [
            f"**{math.prod(column) ** (1 / len(column)):.3f}**" if len(column) == len(shapes) else ""
            for column in columns.values()
        ]
        lines.append(["geometric mean", "", *means])
    gpu = ["GPU, commit"] if others else []
    return aligned(["M, K, N, R", *gpu, "XLA frozen, µs, forward / f + b", *COLUMNS], lines) if lines else ""


def beside(kernels: list[Row], triton: list[Row], torch: list[Row]) -> str:
    """Forward + backward of JAX and of PyTorch, each as a ratio to the frozen linear of its own framework."""
    found: dict[tuple[str, bool], dict[str, str]] = {}
    for rows, theirs, names in ((kernels, "", ("XLA LoRA", "kernels")), (triton, "Triton ", ("kernels",))):
        for row in rows:
            name, _, dropout = row["row"].partition(", ")
            if row["pass"] == "forward + backward" and name in names:
                key = "{}, {}, {}, {}".format(*shape_of(row)), bool(dropout)
                found.setdefault(key, {})["JAX: " + theirs + name] = f"{row['ratio']:.2f}"
    shapes = dict.fromkeys(row["shape"].replace(",", ", ") for row in torch)
    for row in torch:
        if row["pass"] == "forward + backward, captured" and row["row"] in TORCH:
            key = row["shape"].replace(",", ", "), row["rate"] > 0
            found.setdefault(key, {})["torch: " + row["row"]] = f"{row['ratio']:.2f}"
    columns = ["JAX: XLA LoRA", "JAX: kernels", "JAX: Triton kernels", *("torch: " + name for name in TORCH)]
    lines = [
        [shape, "dropout" if dropped else "", *(found.get((shape, dropped), {}).get(name, "") for name in columns)]
        for dropped in (False, True)
        for shape in shapes
    ]
    return aligned(["M, K, N, R", "", *columns], lines)


def alone(rows: list[Row]) -> str:
    lines = [
        [
            "{}, {}, {}, {}".format(*shape_of(row)),
            row["row"],
            f"{row['median_us']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['tflops']:.0f}",
            f"{row['tb_per_s']:.2f}" if "tb_per_s" in row else "",
        ]
        for row in rows
        if row["pass"] == "alone"
    ]
    header = ["M, K, N, R", "kernel", "µs", "ratio to the frozen forward", "TFLOP/s", "TB/s read"]
    return aligned(header, lines) if lines else ""


def groups(rows: list[Row]) -> str:
    """One line a shape and pass, one table for those with the same rows."""
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((shape_of(row), row["pass"]), []).append(row)
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for (shape, passes), each in lines.items():
        cells = [
            f"{each[0]['median_us']:.0f} µs",
            *("{:.3f} ({:.3f} to {:.3f})".format(r["ratio"], *r["ratio_spread"]) for r in each[1:]),
        ]
        held = [f"; {row['temporary_bytes'] / 1e9:.2f} GB" if "temporary_bytes" in row else "" for row in each]
        cells = [cell + beside for cell, beside in zip(cells, held, strict=True)]
        sizes = ", ".join(str(size) if isinstance(size, int) else " + ".join(map(str, size)) for size in shape)
        tables.setdefault(tuple(row["row"] for row in each), []).append([sizes, passes, *cells])
    return "\n".join(aligned(["M, K, N, R", "pass", *names], found) for names, found in tables.items())


def training(rows: list[Row]) -> str:
    lines = [
        [
            row["pass"].removeprefix("training step, "),
            row["row"],
            f"{row['median_us'] / 1000:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['tokens_per_s']:,}",
            f"{row['planned_bytes'] / 1e9:.2f}",
        ]
        for row in rows
    ]
    return aligned(["layers", "step", "ms", "ratio to the floor", "tokens/s", "GB planned by XLA"], lines)


def tables() -> str:
    kernels, several, train = (read(RESULTS / f"{name}.jsonl") for name in ("kernels", "groups", "train_step"))
    parts = []
    if kernels:
        parts.append(source(kernels) + "Ratios to XLA's frozen linear; in brackets the middle half of the rounds.\n")
        parts += [ratios(kernels, others=False)]
        parts += ["From fewer rows on (`--shapes`):\n", fewer] if (fewer := ratios(kernels, others=True)) else []
        triton, torch = read(RESULTS / "triton.jsonl"), of_last_commit(RESULTS / "torch_lora.jsonl")
        told = "Beside others, forward + backward; dropout 0.05 in JAX, 0.1 in PyTorch, there in CUDA graphs "
        told += f"([their page](torch-lora.md#measured)). Triton from JAX: {measured_by(triton)}. "
        told += f"PyTorch: {measured_by(torch)}.\n"
        parts += [told, beside(kernels, triton, torch)] if torch else []
        parts += ["Each kernel alone:\n", alone(kernels)] if alone(kernels) else []
    if several:
        told = "Ratios to the first column; GB: what a gradient through a scan over four such layers needs.\n"
        parts += ["Groups, a bias, the gated MLP (`groups.py`). " + source(several) + told, groups(several)]
    if train:
        parts += ["A training step (`--train`). " + source(train), training(train)]
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    renew(__doc__, BEGIN, END, tables)
