"""Every test that the page about PEFT's checklist names exists, and every number of the checklist has one."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/peft-checklist.md").read_text(encoding="utf-8")
NAME = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@functools.cache
def collected(path: str) -> set[str]:
    """The functions that pytest collects from a file: those whose names begin with `test_`, at its top level."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def absent(page: str) -> list[str]:
    return [
        f"{path}::{name}"
        for path, name in NAME.findall(page)
        if not (ROOT / path).is_file() or name not in collected(path)
    ]


def test_every_named_test_exists() -> None:
    assert not absent(PAGE)
    assert PAGE.count("::") == len(NAME.findall(PAGE)) > 27  # nothing is written in a form that is not looked at
    renamed = PAGE.replace("test_ranks_and_scales", "test_scales_and_ranks", 1)
    assert absent(renamed) == ["tests/interop/test_peft_port.py::test_scales_and_ranks"]
    assert absent("`tests/core/test_gone.py::test_scale`") == ["tests/core/test_gone.py::test_scale"]


def test_every_number_has_a_test() -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 28))
    assert all(NAME.search(proof) for _, proof in rows)
