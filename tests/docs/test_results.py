"""The tables and the picture of the kernels are those of the results; remake them by the command that is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import kernels_plot, kernels_table, many_adapters_table, torch_table

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.pinned


TABLES = {"kernels.md": kernels_table, "many-adapters.md": many_adapters_table, "torch-lora.md": torch_table}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    script, page = TABLES[name], (ROOT / "docs" / name).read_text()
    shown = page.split(script.BEGIN)[1].split(script.END)[0]
    command = f"PYTHONPATH=. python {Path(script.__file__).relative_to(ROOT)} --write docs/{name}"
    assert shown == script.tables(), command


def test_picture():
    picture = (ROOT / "docs/images/kernels.svg").read_text()
    rows = kernels_table.read(kernels_table.RESULTS / "kernels.jsonl")
    command = "python benchmarks/kernels_plot.py --write docs/images/kernels.svg"
    assert f">{kernels_plot.digest(rows)}<" in picture, command
    ratios = [
        each for panel in kernels_plot.points(rows).values() for shape in panel.values() for each in shape.values()
    ]
    assert ratios and all(f">{kernels_plot.label(ratio)}<" in picture for ratio, *_ in ratios), command
    # Another result would be noticed.
    changed = [{**rows[1], "ratio": rows[1]["ratio"] + 0.01}, *rows[:1], *rows[2:]]
    assert kernels_plot.digest(changed) != kernels_plot.digest(rows)
