"""The measured table of `docs/torch-lora.md`, from the lines that `torch_lora.py` wrote.

    PYTHONPATH=. python benchmarks/torch_table.py --write docs/torch-lora.md

Reads `benchmarks/results/torch_lora.jsonl`, of which the lines of the last commit count. Without `--write`, prints it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.kernels_table import Row, aligned

RESULTS = Path(__file__).parent / "results/torch_lora.jsonl"
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


def read(path: Path = RESULTS) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]


def source(rows: list[Row]) -> str:
    """On what, with what and when: once for each combination."""
    names = ("torch", "triton", "peft", "nemo_automodel")
    found = dict.fromkeys(
        f"one {row['gpu']}, {''.join(f'{name} {row[name]}, ' for name in names if name in row)}bfloat16, "
        f"commit {row['commit']}, {row['date']}"
        for row in rows
    )
    return "Measured on " + "; ".join(found) + ".\n"


def table(rows: list[Row]) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page whose table to replace")
    page, text = parser.parse_args().write, table(read())
    if page is None:
        print(text, end="")
        return
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
