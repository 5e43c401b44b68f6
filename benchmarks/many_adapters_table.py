"""The measured table of `docs/many-adapters.md`, from the lines that `many_adapters.py` wrote.

    PYTHONPATH=. python benchmarks/many_adapters_table.py --write docs/many-adapters.md

Reads `benchmarks/results/many_adapters.jsonl`, of which the lines of the last commit count.
Without `--write`, prints it.
"""

from __future__ import annotations

from typing import Any

from benchmarks.kernels_table import source
from benchmarks.pages import RESULTS, Row, aligned, of_last_commit, renew

BEGIN, END = "<!-- table: benchmarks/many_adapters_table.py -->\n", "<!-- end of table -->"
# Row as measured -> column.
COLUMNS = {
    "frozen": "frozen",
    "many, auto": "several",
    "many, gathered": "gathered",
    "many, masked": "masked",
    "many, ragged_dot": "`ragged_dot`",
}


def tables() -> str:
    rows = of_last_commit(RESULTS / "many_adapters.jsonl")
    by = {(*_case(row), row["row"]): row for row in rows}
    lines = []
    for case in dict.fromkeys(map(_case, rows)):
        single, several = by[*case, "single"], by[*case, "many, auto"]
        ratios = {name: f"{by[*case, name]['ratio']:.2f}" for name in COLUMNS}
        ratios["many, auto"] = "**{:.3f}** ({:.3f} to {:.3f})".format(several["ratio"], *several["ratio_spread"])
        bound = f"{single['bytes']:.2f}" if single["bytes"] else ""
        lines.append(
            [case[0], "{} x {}, {}x{}".format(*case[1:]), f"{single['median_us']:.0f}", *ratios.values(), bound]
        )
    header = ["pass", "rows x tokens, K x N", "single, µs", *COLUMNS.values(), "bytes"]
    return source(rows) + "\n" + aligned(header, lines)


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("pass_", "rows", "tokens", "k", "n"))


if __name__ == "__main__":
    renew(__doc__, BEGIN, END, tables)
