"""Flax's own multi-head attention, both APIs: DenseGeneral and LinearGeneral kernels with an axis of heads."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from tests.third_party.check import RANK, Case, FrontEnd, Model, random_params
from tests.third_party.tunix_models import with_random_params

PACKAGE = f"flax=={flax.__version__}"
INPUTS = np.random.default_rng(0).standard_normal((2, 7, 32)).astype(np.float32)
NAMES = ("query", "key", "value", "out")


def linen_attention() -> Model:
    module = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=24, out_features=20)
    x = jnp.asarray(INPUTS)
    params = random_params(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    return Model(module, params, lambda p, x: module.apply({"params": p}, x), (x,), FrontEnd((x,)))


def nnx_attention() -> Model:
    def build() -> Any:
        return nnx.MultiHeadAttention(4, 32, qkv_features=24, out_features=20, decode=False, rngs=nnx.Rngs(0))

    model, params, rebuild = with_random_params(build)
    x = jnp.asarray(INPUTS)
    return Model(model, params, lambda p, x: rebuild(p)(x), (x,), FrontEnd((x,)))


def _case(name: str, api: str, load: Any) -> Case:
    return Case(
        name, PACKAGE, api, load,
        linear=frozenset(f"{n}.kernel" for n in NAMES),
        left_out={f"{n}.bias": "never contracted" for n in NAMES[:3]},
        telling={
            "query.kernel": ("ioo", (32, RANK), (RANK, 4, 6)),
            "out.kernel": ("iio", (4, 6, RANK), (RANK, 20)),
        },
        note="kernels (D, heads, H); biases (heads, H) are no weights",
    )  # fmt: skip


CASES = [
    _case("MultiHeadDotProductAttention", "linen", linen_attention),
    _case("MultiHeadAttention", "nnx", nnx_attention),
]
