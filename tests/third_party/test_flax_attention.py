"""Flax's own multi-head attention in both APIs, and the reason each needs a plan: heads are an axis of the kernel."""

from __future__ import annotations

import pytest

from tests.third_party import check, flax_attention, front_ends


@pytest.mark.parametrize("case", flax_attention.CASES, ids=lambda case: case.name)
def test_model(case):
    model = case.load()
    measured = check.measure(check.check_plans(case, model), model)
    (front_ends.check_linen if case.api == "linen" else front_ends.check_nnx)(case, model, measured)
