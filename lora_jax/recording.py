"""State that observing weights carry through an interpreted function: in at its top, out at its bottom.

A statistic gathered inside a loop's body cannot leave it by itself. So every rule that runs a body in a transformation
of its own (`scan`, `while`, `cond`, `remat`) hands the state in, and takes it out, as one more value of that body. It
is empty unless something observes, and then costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

State = dict[str, Any]


class Recorder:
    """The state of every observed parameter, by name, as the trace has it at this moment. Compared by identity."""

    def __init__(self, state: State | None = None):
        self.state: State = dict(state or {})

    def around(self, run: Callable[[], Any], state: State) -> tuple[Any, State]:
        """`run()` with `state` in place of the present one: its result, and the state after it."""
        outside, self.state = self.state, dict(state)
        try:
            return run(), self.state
        finally:
            self.state = outside
