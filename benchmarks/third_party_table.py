"""The table of `docs/third-party.md`: what is found in unmodified models of other libraries, and how exact it is.

    pip install -r requirements/parity.txt && pip install --no-deps -r requirements/tunix.txt
    PYTHONPATH=. JAX_PLATFORMS=cpu python benchmarks/third_party_table.py --write docs/third-party.md

Runs the checks of `tests/third_party`, which state what must be found; a check that fails ends the script. Models
whose package is not installed are named on stderr and keep no row. Without `--write`, prints the table.
"""

from __future__ import annotations

import collections
import importlib.util
import sys

from benchmarks.pages import renew
from tests.third_party import check, flax_attention, gemma_models, hugging_face, tunix_models

# gemma last: importing it replaces `nn.Module.param` for good, which breaks transformers' Llama.
MODULES = {"flax": flax_attention, "transformers": hugging_face, "tunix": tunix_models, "gemma": gemma_models}
HEADER = (
    "model | package | API | sites: all-linear / `.*` | ops | formed in full "
    "| adapted − merged | adapter's effect | note"
)
BEGIN, END = "<!-- table: benchmarks/third_party_table.py -->\n", "<!-- end of table -->"


def row(case: check.Case) -> str:
    model = case.load()
    plan = check.check_plans(case, model)
    found = check.measure(plan, model)
    ops = collections.Counter(site.op for site in plan.sites)
    formed = len(plan.materialised) or "none"
    cells = [
        case.name,
        f"`{case.package}`",
        case.api,
        f"{len(case.linear)} / {len(plan.sites)}",
        ", ".join(f"{n} {op}" for op, n in sorted(ops.items())),
        str(formed),
        f"{found.error:.0e} (bound {found.bound:.0e})",
        f"{found.effect:.1f}",
        case.note,
    ]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    lines = [f"| {HEADER} |", "|" + " --- |" * len(HEADER.split("|"))]
    for package, module in MODULES.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: no rows for {len(module.CASES)} models", file=sys.stderr)
            continue
        for case in module.CASES:
            lines.append(row(case))
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    renew(__doc__, BEGIN, END, table)
