"""Unmodified nnx models of google-tunix 0.1.7."""

from __future__ import annotations

import pytest

import lora_jax as lj
from tests.third_party import check, front_ends, tunix_models

pytest.importorskip("tunix.models.llama3.model", reason="pip install --no-deps google-tunix==0.1.7")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("case", tunix_models.CASES, ids=lambda case: case.name)
def test_model(case):
    model = case.load()
    measured = check.measure(check.check_plans(case, model), model)
    front_ends.check_nnx(case, model, measured)


def test_a_named_router_is_adapted():
    """`"all-linear"` leaves routers alone; a user who names one gets it."""
    model = tunix_models.qwen3(num_experts=4, num_experts_per_tok=2)
    config = check.ALL_LINEAR.replace(target_modules=["router", "down_proj"])
    plan = lj.plan(model.fn, model.params, *model.args, config=config)
    assert {site.name for site in plan.sites} == check.layers(
        2, "layers.{}.mlp.router.kernel", "layers.{}.mlp.down_proj"
    )
    check.measure(plan, model)
