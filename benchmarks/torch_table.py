"""The measured table of `docs/torch-lora.md`, from the lines that `torch_lora.py` wrote.

    PYTHONPATH=. python benchmarks/torch_table.py --write docs/torch-lora.md

Reads `benchmarks/results/torch_lora.jsonl`, of which the lines of the last commit count. Without `--write`, prints it.
"""

from __future__ import annotations

from benchmarks.pages import RESULTS, Row, aligned, of_last_commit, renew

BEGIN, END = "<!-- table: benchmarks/torch_table.py -->\n", "<!-- end of table -->"
# Pass as measured and rate -> as told.
PASSES = {
    ("forward, captured", 0.0): "forward",
    ("forward + backward, captured", 0.0): "forward + backward",
    ("forward + backward, captured", 0.1): "forward + backward, dropout 0.1",
    ("forward + backward", 0.0): "forward + backward, launched from Python",
}
# Row as measured -> column.
COLUMNS = {
    "peft": "peft",
    "torch.compile": "torch.compile",
    "addmm function": "addmm function",
    "NeMo Automodel": "NeMo Automodel",
    "LinearLoRA": "LinearLoRA",
    "TritonLinearLoRA": "TritonLinearLoRA",
    "TritonLinearLoRA, x @ A kept": "the same, `x @ A` kept",
    "TritonLinearLoRA, tail by torch": "that, tail by torch",
}


def source(rows: list[Row]) -> str:
    """On what, with what and when: once for each combination."""
    names = ("torch", "triton", "peft", "nemo_automodel")
    found = dict.fromkeys(
        f"one {row['gpu']}, {''.join(f'{name} {row[name]}, ' for name in names if name in row)}bfloat16, "
        f"commit {row['commit']}, {row['date']}"
        for row in rows
    )
    return "Measured on " + "; ".join(found) + ".\n"


def tables() -> str:
    rows = of_last_commit(RESULTS / "torch_lora.jsonl")
    ratios = {(row["shape"], row["pass"], row["rate"], row["row"]): row for row in rows if row["pass"] != "check"}
    measured = {name for _, _, _, name in ratios}
    columns = {name: told for name, told in COLUMNS.items() if name in measured}
    lines = []
    for shape in dict.fromkeys(shape for shape, *_ in ratios):
        for (kind, rate), told in PASSES.items():
            frozen = ratios.get((shape, kind, rate, "frozen"))
            if frozen is None:
                continue
            here = [ratios.get((shape, kind, rate, name)) for name in columns]
            cells = [f"{row['ratio']:.2f}" if row else "" for row in here]
            lines.append([shape.replace(",", ", "), told, f"{frozen['median_us']:.0f}", *cells])
    return source(rows) + "\n" + aligned(["M, K, N, R", "pass", "frozen, µs", *columns.values()], lines)


if __name__ == "__main__":
    renew(__doc__, BEGIN, END, tables)
