"""A small nnx module for the names of PEFT, and what it gives by hand."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import peft
from tests.core.harness import normal

X = normal(5, 6)
BOTH = ["up", "down"]


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))

    def hidden(self, x):
        return jnp.tanh(self.up(x))


def base():
    return Mlp(nnx.Rngs(0))


def config(**settings):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": BOTH, "init_lora_weights": False, **settings})


def two():
    """A model with adapters "default" and "other", which differ in rank and targets."""
    module = base()
    model = peft.get_peft_model(module, config(), inputs=(X,))
    model.add_adapter("other", config(r=3, target_modules=["up"]))
    return module, model


def by_hand(module, model, scales):
    """The module's outputs with `scales[name]` times the change of each adapter in its kernels."""
    params = {}
    for name in BOTH:
        params[name] = np.asarray(getattr(module, name).kernel[...], np.float64)
    for name, scale in scales.items():
        for site in model.adapter(name).sites:
            a, b = (np.asarray(f, np.float64) for f in model.adapter(name).factors(site))
            params[site.path[0]] = params[site.path[0]] + scale * site.alpha / site.rank * a @ b
    bias = {name: np.asarray(getattr(module, name).bias[...]) for name in BOTH}
    return np.tanh(X @ params["up"] + bias["up"]) @ params["down"] + bias["down"]


def close(got, want):
    return bool(np.abs(np.asarray(got) - want).max() < 1e-5)
