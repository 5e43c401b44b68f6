"""One model with a weight of every layout, and each weight as the matrices (in, out) that a reader would write down."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lora_jax as lj
from tests.core.harness import normal

IDS = np.array([[1, 4, 9, 0, 3], [2, 2, 8, 5, 7]])
EVERY = ["table", "heads", "fused", "conv", "stack", "experts", "head"]
# Lookups have no inputs to observe.
MULTIPLIED = EVERY[1:]


def fn(params: Any, ids: Any) -> Any:
    h = params["table"][ids]  # (2, 5, 8)
    h = jnp.tanh(jnp.einsum("hdk,btd->bthk", params["heads"], h))  # weight first, heads outside
    h = h.reshape(*h.shape[:2], 12) @ params["fused"].reshape(2, 6, 12).reshape(12, 12).T  # stored (out, in)
    h = lax.conv_general_dilated(h, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    h, _ = lax.scan(jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None)), h, params["stack"])
    h = jnp.einsum("ebi,eio->beo", jnp.stack([h.reshape(-1, 10), 2 * h.reshape(-1, 10)]), params["experts"])
    return h.sum(1) @ params["head"].T


def params() -> dict[str, np.ndarray]:
    shapes = {
        "table": (10, 8), "heads": (2, 8, 6), "fused": (12, 12), "conv": (3, 12, 10), "stack": (3, 10, 10),
        "experts": (2, 10, 9), "head": (7, 9),
    }  # fmt: skip
    return {name: normal(*shape, seed=n) / np.float32(np.sqrt(10)) for n, (name, shape) in enumerate(shapes.items())}


def matrices(name: str, w: Any) -> list[np.ndarray]:
    w = np.asarray(w, np.float64)
    if name == "heads":
        return [w.transpose(1, 0, 2).reshape(8, 12)]
    if name == "conv":
        return [w.reshape(36, 10)]
    if name in ("fused", "head"):
        return [w.T]
    return list(w) if w.ndim == 3 else [w]


def plan(tree: Any, names: list[str] = EVERY, **settings: Any) -> lj.Plan:
    settings = {"rank": 3, "alpha": 4.0, "target_modules": names, "dtype": "float64", **settings}
    return lj.plan(fn, tree, jnp.asarray(IDS), config=lj.LoRAConfig(**settings))


def doubled(adapter: lj.Adapter) -> lj.Adapter:
    """The same factors with twice the scale."""
    leaves = {
        site.leaf_path(f): adapter.leaf(site.leaf_path(f)) for site in adapter.sites for f in ("lora_A", "lora_B")
    }
    leaves |= {path: 2 * leaf for path, leaf in leaves.items() if "lora_B" in path}
    return lj.Adapter.from_leaves(leaves, adapter.sites)
