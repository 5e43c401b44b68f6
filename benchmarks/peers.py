"""What happens to a weight written in different ways: this library, qwix and flax's own nnx.LoRA.

For each way of using a weight, asks each library to adapt it with random factors and compares the output with
`x` through the explicitly merged weight, or where the library's factors cannot be found, with the base's output.

    pip install qwix==0.1.8          # on Python 3.11, next to jax 0.10.2 and flax 0.12.8
    python benchmarks/peers.py

Prints a Markdown table: "adapted", "silently none" (the output is the base's), or the error's name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import lora_jax as lj

D = 8
KEY = jax.random.key(0)


class Raw(nnx.Module):
    """One parameter and a function that uses it."""

    def __init__(self, shape: tuple[int, ...], use: Callable):
        self.w = nnx.Param(jax.random.normal(KEY, shape))
        self._use = use

    def __call__(self, x):
        return self._use(self.w, x)


class Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(16, D, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.embed.attend(self.embed(jnp.arange(4)))


class Stack(nnx.Module):
    """Layers made by nnx.vmap and run by nnx.scan."""

    def __init__(self):
        make = nnx.vmap(lambda rngs: nnx.Linear(D, D, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = make(nnx.Rngs(0).fork(split=3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


X = jax.random.normal(jax.random.key(1), (4, D))
GROUPS = jnp.array([1, 3])
CASES: dict[str, Callable[[], nnx.Module]] = {
    "`nnx.Linear`": lambda: nnx.Linear(D, D, rngs=nnx.Rngs(0)),
    "`dot(x, w)`, a raw parameter": lambda: Raw((D, D), lambda w, x: jnp.dot(x, w[...])),
    "`x @ w`": lambda: Raw((D, D), lambda w, x: x @ w[...]),
    "`einsum('dn,bd->bn', w, x)`": lambda: Raw((D, D), lambda w, x: jnp.einsum("dn,bd->bn", w[...], x)),
    "`dot(x, w.T)`": lambda: Raw((6, D), lambda w, x: jnp.dot(x, w[...].T)),
    "`dot(x, w[0]) + dot(x, w[1])`": lambda: Raw((2, D, D), lambda w, x: jnp.dot(x, w[0]) + jnp.dot(x, w[1])),
    "`dot(x, w.reshape(8, -1))`": lambda: Raw((D, 2, 4), lambda w, x: jnp.dot(x, w[...].reshape(D, -1))),
    "embedding lookup + tied `attend`": Tied,
    "`nnx.scan` over stacked layers": Stack,
    "experts, `ragged_dot`": lambda: Raw((2, D, D), lambda w, x: lax.ragged_dot(x, w[...], GROUPS)),
}


def ours(model: nnx.Module) -> str:
    config = lj.LoRAConfig(rank=2, target_modules=".*", init="random")
    adapted = lj.nnx.adapt(model, config, X, rngs=nnx.Rngs(2))
    return verdict(adapted(X), model(X), lj.nnx.merge(adapted)(X))


def qwix_lora(model: nnx.Module) -> str:
    import qwix

    before = model(X)
    provider = qwix.LoraProvider([qwix.LoraRule(module_path=".*", rank=2, alpha=4)])
    adapted = qwix.apply_lora_to_model(model, provider, X, rngs=nnx.Rngs(2))
    state = nnx.state(adapted, nnx.LoRAParam)
    nnx.update(adapted, jax.tree.map(lambda v: jax.random.normal(KEY, v.shape), state))
    return verdict(adapted(X), before, None)


def flax_lora(model: nnx.Module) -> str:
    if not isinstance(model, nnx.Linear):
        return "no such layer"
    adapted = nnx.LoRA(D, 2, D, base_module=model, rngs=nnx.Rngs(2))
    adapted.lora_b[...] = jax.random.normal(KEY, adapted.lora_b.shape)
    return verdict(adapted(X), model(X), None)


def verdict(got: jax.Array, base: jax.Array, merged: jax.Array | None) -> str:
    if jnp.allclose(got, base, atol=1e-6):
        return "**silently none**"
    if merged is not None:
        assert jnp.allclose(got, merged, rtol=1e-4, atol=1e-4), "differs from the merged model"
    return "adapted"


def main() -> None:
    columns = {"lora_jax": ours, "qwix 0.1.8": qwix_lora, "flax `nnx.LoRA`": flax_lora}
    print("| the model writes | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, make in CASES.items():
        cells = []
        for run in columns.values():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    cells.append(run(make()))
            except Exception as error:  # the table shows which
                cells.append(f"`{type(error).__name__}`")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
