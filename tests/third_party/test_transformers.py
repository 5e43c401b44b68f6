"""Unmodified Flax models of transformers 4.57."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.third_party import check, front_ends, hugging_face

transformers = pytest.importorskip("transformers", "4.57", exc_type=ImportError)
if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
    pytest.skip("transformers 5 has no Flax models", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("case", hugging_face.CASES, ids=lambda case: case.name)
def test_model(case):
    model = case.load()
    measured = check.measure(check.check_plans(case, model), model)
    front_ends.check_linen(case, model, measured)


def test_cached_decoding():
    """One token at a time through GPT-2's cache, a mutable collection, gives the merged model's logits."""
    model = hugging_face.gpt2()
    module, params, tokens = model.module, model.params, model.front_end.kwargs["input_ids"]
    batch, length = tokens.shape
    mask = jnp.ones((batch, length), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    cache = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, mask, position, init_cache=True))["cache"]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    config = lj.LoRAConfig(rank=2, alpha=5, target_modules=".*", init="random")
    adapted, adapter = lj.linen.adapt(
        module, params, config, tokens[:, :1], mask, position[:, :1],
        key=jax.random.key(0), variables={"cache": cache}, mutable=["cache"],
    )  # fmt: skip

    @jax.jit
    def step(lora: Any, cache: Any, token: Any, at: Any) -> tuple[Any, Any]:
        variables = {"params": params, "lora": lora, "cache": cache}
        y, updated = adapted.apply(variables, token, mask, at, mutable=["cache"])
        return y.logits, updated["cache"]

    def decode(lora: Any) -> np.ndarray:
        state, out = cache, []
        for t in range(length):
            logits, state = step(lora, state, tokens[:, t : t + 1], position[:, t : t + 1])
            out.append(logits)
        return np.concatenate(out, axis=1)

    want = model.fn(check.merged_params(params, adapter), tokens, mask)
    bound = check.bound_of(adapted.plan, want)
    assert check.largest(decode(adapter), want) <= bound
    assert check.largest(decode(jax.tree.map(jnp.zeros_like, adapter)), want) > 1e3 * bound


def test_batch_statistics_in_training():
    """ResNet in training mode: the output and the updated running statistics are the merged model's."""
    model = hugging_face.resnet("basic")
    (x,), stats = model.front_end.args, model.front_end.variables["batch_stats"]
    adapted, adapter = lj.linen.adapt(
        model.module, model.params, check.EVERYTHING, x, False,
        key=jax.random.key(0), variables={"batch_stats": stats}, mutable=["batch_stats"],
    )  # fmt: skip

    def train(apply: Any, **collections: Any) -> tuple[Any, list[Any]]:
        y, updated = apply({"batch_stats": stats, **collections}, x, False, mutable=["batch_stats"])
        return y.logits, jax.tree.leaves(updated["batch_stats"])

    @check.quick_jit
    def run(params: Any, lora: Any) -> Any:
        return train(adapted.apply, params=params, lora=lora)

    y, moved = run(model.params, adapter)
    merged = check.merged_params(model.params, adapter)
    want, want_moved = check.quick_jit(lambda params: train(model.module.apply, params=params))(merged)
    base, base_moved = run(model.params, jax.tree.map(jnp.zeros_like, adapter))
    bound = check.bound_of(adapted.plan, want)
    assert check.largest(y, want) <= bound < 1e-3 * check.largest(base, want)
    for got, wanted, plain in zip(moved, want_moved, base_moved, strict=True):
        bound = check.bound_of(adapted.plan, wanted)
        assert check.largest(got, wanted) <= bound < check.largest(plain, wanted)
