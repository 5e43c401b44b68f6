"""The plot of `docs/kernels.md`, from the lines that `kernels.py` wrote; needs matplotlib, as in `pip install .[docs]`.

    python benchmarks/kernels_plot.py --write docs/images/kernels.svg

The file holds a digest of what was drawn, so that a test can tell whether it is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.kernels_table import COLUMNS, RESULTS, Row, read, shape_of  # noqa: E402

PANELS = ("forward", "f + b", "f + b, dropout")
COLOURS = {"XLA LoRA": "#d55e00", "kernels": "#0072b2"}


def points(rows: list[Row]) -> dict[str, dict[tuple[int, ...], dict[str, tuple[float, float, float]]]]:
    """`{panel: {shape: {who: (ratio, low, high)}}}`, shapes in the order of the file."""
    by = {(row["pass"], row["row"], shape_of(row)): row for row in rows}
    found: dict[str, Any] = {panel: {} for panel in PANELS}
    for heading, key in COLUMNS.items():
        who, _, panel = heading.partition(", ")
        for shape in dict.fromkeys(map(shape_of, rows)):
            if row := by.get((*key, shape)):
                found[panel].setdefault(shape, {})[who] = (row["ratio"], *row["ratio_spread"])
    return found


def digest(rows: list[Row]) -> str:
    listed = [[panel, shape, each] for panel, shapes in points(rows).items() for shape, each in shapes.items()]
    return "data " + hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:16]


def label(ratio: float) -> str:
    return f"{ratio:.2f}"


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    found = points(rows)
    shapes = list(dict.fromkeys(shape for panel in found.values() for shape in panel))
    places = {shape: -i for i, shape in enumerate(shapes)}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kernels", "font.size": 9}):
        figure = Figure(figsize=(9, 1.4 + 0.55 * len(shapes)), layout="constrained")
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for ax, (panel, each) in zip(axes, found.items(), strict=True):
            ax.axvline(1, color="#888888", linewidth=1)
            for who, colour in COLOURS.items():
                drawn = [(shape, values[who]) for shape, values in each.items() if who in values]
                at = [places[shape] + (0.16 if who == "kernels" else -0.16) for shape, _ in drawn]
                ratios = [values[0] for _, values in drawn]
                spread = [[v[0] - v[1] for _, v in drawn], [v[2] - v[0] for _, v in drawn]]
                ax.errorbar(ratios, at, xerr=spread, fmt="o", color=colour, markersize=5, label=who)
                for ratio, y in zip(ratios, at, strict=True):
                    ax.annotate(label(ratio), (ratio, y), (6, 0), textcoords="offset points", va="center", fontsize=8)
            ax.set_title(panel.replace("f + b", "forward + backward"))
            ax.margins(x=0.25, y=0.25)
            ax.grid(axis="x", color="#dddddd", linewidth=0.6)
            ax.set_axisbelow(True)
        axes[0].set_yticks(list(places.values()), [f"M={s[0]}, K={s[1]}, N={s[2]}, R={s[3]}" for s in places])
        axes[1].set_xlabel("time over that of the frozen linear by XLA")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
        # Black text has to be legible on a dark page too.
        figure.patch.set_facecolor("white")
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": digest(rows)})
    # matplotlib leaves blanks at the ends of lines, which editors and git complain of.
    text = "".join(line.rstrip() + "\n" for line in path.read_text(encoding="utf-8").splitlines())
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, help="the SVG file")
    draw(read(RESULTS / "kernels.jsonl"), parser.parse_args().write)


if __name__ == "__main__":
    main()
