"""What the scripts share that write a measured table into a page: reading lines of results, and renewing the page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def lines(path: Path) -> list[Row]:
    """All of a file, or none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line] if path.exists() else []


def of_last_commit(path: Path) -> list[Row]:
    """The lines of the commit that the last one names."""
    rows = lines(path)
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]


def aligned(header: list[str], cells: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *cells]
    return "".join("| " + " | ".join(each) + " |\n" for each in rows)


def renew(doc: str | None, begin: str, end: str, make: Callable[[], str]) -> None:
    """The command line of such a script: prints what `make` gives, or with `--write` puts it between the marks."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page whose tables to replace")
    page, text = parser.parse_args().write, make()
    if page is None:
        print(text, end="")
        return
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")
