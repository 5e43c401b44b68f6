"""The front ends hand `implementation` on."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax import reference
from lora_jax.ops import recording
from tests.core.harness import cast, config, normal
from tests.kernels import reference_kernels

X = cast(normal(5, 16), jnp.bfloat16)


def linen(implementation):
    model = nn.Dense(24, param_dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), X)["params"]
    adapted, adapter = lj.linen.adapt(
        model, params, config(), X, key=jax.random.key(1), implementation=implementation
    )  # fmt: skip
    return adapted.apply({"params": params, "lora": adapter}, X), model.apply({"params": params}, X)


def with_nnx(implementation):
    model = nnx.Linear(16, 24, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapted = lj.nnx.adapt(model, config(), X, rngs=nnx.Rngs(1), implementation=implementation)
    return adapted(X), model(X)


@pytest.mark.parametrize("front_end", [linen, with_nnx])
def test_implementation(front_end):
    with reference_kernels.installed() as calls, recording() as choices:
        want, plain = (np.asarray(y, np.float64) for y in front_end("xla"))
        assert not calls
        got, _ = front_end(None)
        assert calls == [("forward", (5, 16, 24, 3))]
    assert [choice.implementation for choice in choices] == ["xla", "reference"]
    bound = reference.tolerance(jnp.bfloat16, 19) * np.abs(want).max()
    assert reference.excess(got, want, bound) <= 1 < reference.excess(plain, want, bound)
    with pytest.raises(ValueError, match="implementation='gpu'"):
        front_end("gpu")
    with pytest.raises(ValueError, match="can't run the product of `kernel` .* the platform here is cpu"):
        front_end("mosaic_gpu")
