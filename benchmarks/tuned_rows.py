"""The table of what was measured, `lora_jax/kernels/tuned_rows.py`, from the lines of the benchmarks.

    python benchmarks/tuned_rows.py --write lora_jax/kernels/tuned_rows.py

Reads `kernels.jsonl` and `triton.jsonl` in `benchmarks/results` (forward + backward, against XLA) and `tuning.jsonl`,
which `lora-jax tune ... --log benchmarks/results/tuning.jsonl` writes (the fastest tiles of a shape). Of a row measured
more than once, the last counts. Without `--write`, prints the module.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.pages import RESULTS, lines  # noqa: E402

HEAD = '''"""What was measured where. Written by `benchmarks/tuned_rows.py`, each row from the line that it cites."""

# ruff: noqa: E501
from __future__ import annotations

from lora_jax.kernels.measured import Race, Tiles

'''


def races(path: Path) -> Iterator[tuple[Any, ...]]:
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for line in lines(path):
        name, _, dropout = line["row"].partition(", ")
        if line["pass"] == "forward + backward" and name in ("XLA LoRA", "kernels"):
            key = (line["gpu"], line["m"], line["k"], line["n"], line["r"], dropout == "dropout")
            found.setdefault(key, {})[name] = line
    for key, pair in found.items():
        if len(pair) == 2:
            yield (*key, pair["XLA LoRA"]["ratio"], pair["kernels"]["ratio"], pair["kernels"]["commit"])


def tiles() -> Iterator[tuple[Any, ...]]:
    found = {}
    for line in lines(RESULTS / "tuning.jsonl"):
        if line["kind"] == "tiles":
            found[line["device"], line["kernel"], json.dumps(line["shape"])] = line
    for line in found.values():
        if not line["general"]:
            yield tuple(line[name] for name in ("device", "kernel", "shape", "config", "commit"))


def module() -> str:
    parts = [HEAD]
    parts.append("RACES: dict[str, tuple[Race, ...]] = {\n")
    for family, file in (("mosaic_gpu", "kernels.jsonl"), ("triton", "triton.jsonl")):
        parts.append(f'    "{family}": {_rows("Race", races(RESULTS / file), 4)},\n')
    parts.append(f"}}  # fmt: skip\nTILES: tuple[Tiles, ...] = {_rows('Tiles', tiles(), 0)}  # fmt: skip\n")
    return "".join(parts)


def _rows(kind: str, rows: Iterator[tuple[Any, ...]], indent: int) -> str:
    margin = " " * indent
    each = [f"{margin}    {kind}({', '.join(map(_literal, row))}),\n" for row in rows]
    return f"(\n{''.join(each)}{margin})" if each else "()"


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value).replace("'", '"')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the module to write")
    path = parser.parse_args().write
    if path is None:
        print(module(), end="")
    else:
        path.write_text(module(), encoding="utf-8")


if __name__ == "__main__":
    main()
