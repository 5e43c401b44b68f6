"""Every Python example of the README and the documentation runs.

The ```python blocks of one page run in order and share their names, as a reader pastes them one after the other.
A block that cannot run here says so in its first line, with the reason:

    ```python no-run: needs two GPUs

A page about what not every installation has says so in its first line: `<!-- needs: torch, peft -->`.
"""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = re.compile(r"<!-- needs: (.*) -->\n")
# Its tolerances are those of optimised programs, as at its readers'; the others with ones that are not, see `conftest`.
OPTIMISED = "docs/initialisers.md"
# What the newest jax and flax are tried with; the whole documentation runs on the pinned ones.
ON_EVERY_STACK = ("README.md", "docs/quickstart-linen.md", "docs/quickstart-nnx.md", "docs/many-adapters.md")
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def snippets(text: str) -> list[tuple[int, str]]:
    """The Python blocks to run, each with the number of its first line."""
    found = []
    for fence in FENCE.finditer(text):
        language, _, rest = fence["info"].strip().partition(" ")
        if language not in ("python", "py"):
            continue
        line = text.count("\n", 0, fence.start("body")) + 1
        if rest.startswith("no-run"):
            if not rest.removeprefix("no-run").strip(": "):
                raise ValueError(f"the block at line {line} is marked no-run without a reason")
            continue
        body = re.sub(f"^{fence['indent']}", "", fence["body"], flags=re.MULTILINE)
        found.append((line, body))
    return found


def run(page: Path, text: str) -> None:
    names: dict[str, object] = {"__name__": f"snippets_of_{page.stem}"}
    for line, body in snippets(text):
        # The empty lines make a traceback name the line of the page.
        exec(compile("\n" * (line - 1) + body, str(page), "exec"), names)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=() if name(p) in ON_EVERY_STACK else pytest.mark.pinned, id=name(p)) for p in PAGES]
)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    if found := NEEDS.match(text):
        for module in found[1].split(", "):
            pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_disable_most_optimizations", name(page) != OPTIMISED)
    run(page, text)


def test_a_wrong_example_is_noticed() -> None:
    page = "```python\nx = 1\n```\ntext\n\n```python\nassert x == 2\n```\n"
    assert [line for line, _ in snippets(page)] == [2, 7]
    with pytest.raises(AssertionError) as failure:
        run(Path("page.md"), page)
    assert failure.traceback[-1].lineno == 6  # counted from 0: line 7 of the page


def test_blocks_that_do_not_run_say_why() -> None:
    assert snippets("```python no-run: needs two GPUs\nboom\n```\n") == []
    assert snippets("```console\n$ boom\n```\n") == []
    with pytest.raises(ValueError, match="line 2"):
        snippets("```python no-run\nboom\n```\n")
