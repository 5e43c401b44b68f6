"""The tables and the picture of the kernels are those of the results; remake them by the command that is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import kernels_plot, kernels_table, many_adapters_table

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.pinned


def test_tables():
    page = (ROOT / "docs/kernels.md").read_text()
    shown = page.split(kernels_table.BEGIN)[1].split(kernels_table.END)[0]
    assert shown == kernels_table.tables(), "python benchmarks/kernels_table.py --write docs/kernels.md"


def test_table_of_many_adapters():
    page = (ROOT / "docs/many-adapters.md").read_text()
    shown = page.split(many_adapters_table.BEGIN)[1].split(many_adapters_table.END)[0]
    command = "python benchmarks/many_adapters_table.py --write docs/many-adapters.md"
    assert shown == many_adapters_table.table(many_adapters_table.read()), command


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


def test_table_of_torch():
    from benchmarks import torch_table

    page = (ROOT / "docs/torch-lora.md").read_text()
    shown = page.split(torch_table.BEGIN)[1].split(torch_table.END)[0]
    command = "PYTHONPATH=. python benchmarks/torch_table.py --write docs/torch-lora.md"
    assert shown == torch_table.table(torch_table.read()), command
