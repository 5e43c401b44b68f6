"""Showing that something moves: a rich bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from lora_jax.cli._show import console


class Progress(Protocol):
    def update(self, done: int, text: str = "") -> None: ...


@contextmanager
def progress(label: str, total: int, *, done: int = 0, every: int = 10) -> Iterator[Progress]:
    """Shows `done` of `total`, the time left, and the text of the last update.

    **Arguments:** `every`: updates between two lines when the output is not a terminal.
    """
    out = console()
    if not out.is_terminal:
        yield _Lines(out, label, total, done, every)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
    ]  # fmt: skip
    with Bar(*columns, console=out) as bar:
        task = bar.add_task(label, total=total, completed=done, text="")
        yield _Bar(bar, task)


class _Bar:
    def __init__(self, bar: Any, task: Any):
        self._bar, self._task = bar, task

    def update(self, done: int, text: str = "") -> None:
        self._bar.update(self._task, completed=done, text=text)


class _Lines:
    def __init__(self, out: Any, label: str, total: int, done: int, every: int):
        self._out, self._label, self._total, self._every = out, label, total, every
        self._start, self._first = time.monotonic(), done

    def update(self, done: int, text: str = "") -> None:
        if done % self._every and done != self._total:
            return
        elapsed = time.monotonic() - self._start
        left = elapsed / max(done - self._first, 1) * (self._total - done)
        self._out.print(f"{self._label} {done}/{self._total}  {text}  ETA {int(left) // 60}:{int(left) % 60:02d}")
