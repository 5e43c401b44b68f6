"""Which of these tests can run on this jax, and that what the machine's user has measured changes none."""

from importlib.metadata import version
from pathlib import Path

import pytest

# The GPU interpreter of jax 0.10 has no transposed operands and never ends on a machine of two cores. The version is
# read without importing jax, whose platform is not chosen yet when this file is loaded.
_INTERPRETED = tuple(map(int, version("jax").split(".")[:2])) >= (0, 11)
collect_ignore = [] if _INTERPRETED else ["test_mosaic_interpret.py", "test_mosaic_adapted.py", "test_mosaic_many.py"]


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch):
    from lora_jax.kernels import tuning_cache

    monkeypatch.setattr(tuning_cache, "path", lambda: Path("no such folder", "tuned.json"))
    tuning_cache.reread()
    yield
    tuning_cache.reread()
