"""The example ends where a run that stays in torch ends."""

import pytest

pytest.importorskip("torch")


def test_a_moved_run_ends_where_one_that_stays_ends(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import move_between_worlds

    assert move_between_worlds.main() < 1e-5
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert lines == ["torch"] * 14 + ["JAX"] * 3 + ["torch"] * 3
