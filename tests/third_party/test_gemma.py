"""Unmodified models of gemma 3.3, where the package and TensorFlow are installed (see `gemma_models`)."""

from __future__ import annotations

import importlib.util

import pytest
from flax import linen as nn

from tests.third_party import check, front_ends, gemma_models

MISSING = [name for name in ("gemma", "kauldron", "tensorflow") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore"),  # those of importing TensorFlow
]


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """The package replaces `nn.Module.param` for good when imported, which breaks transformers' Llama."""
    monkeypatch.setattr(nn.Module, "param", nn.Module.param)


@pytest.mark.parametrize("case", gemma_models.CASES, ids=lambda case: case.name)
def test_model(case):
    model = case.load()
    measured = check.measure(check.check_plans(case, model), model)
    front_ends.check_linen(case, model, measured)
