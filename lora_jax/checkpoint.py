"""Adapters in orbax checkpoints, together with the sites that say what they adapt.

An `Adapter` is an ordinary pytree, so orbax saves and restores it as it is, given a plan to restore into. What is
added here is a small JSON item beside the arrays: sites, and optionally the configuration. With it a checkpoint
restores without the model, and the result merges and exports. Two items of one composite checkpoint:

    <directory>/adapter     the factors, at the names they have in the tree
    <directory>/lora        {"format": 1, "sites": [...], "dtypes": {...}, "config": {...} or null}

orbax is imported when a function is called, not with this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import Adapter, expected_leaves
from lora_jax.config import LoRAConfig
from lora_jax.sites import Site

ADAPTER = "adapter"
LORA = "lora"
FORMAT = 1

Path = str | os.PathLike[str]
Sharding = Any  # jax.sharding.Sharding, or a function from (leaf path, shape) to one


def save(directory: Path, adapter: Adapter, *, config: LoRAConfig | None = None, overwrite: bool = False) -> None:
    """Writes one adapter; the directory appears when it is complete.

    **Arguments:** `config` is kept for `read_config`, so that the adapter can be exported or extended later.

    **Raises:** `ValueError` if the directory exists, unless `overwrite`.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    target = _absolute(directory)
    if epath.Path(target).exists() and not overwrite:
        raise ValueError(f"{directory} exists already; choose another directory, or pass `overwrite=True`.")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(target, args=ocp.args.Composite(**save_items(adapter, config)), force=overwrite)


def restore(directory: Path, *, sharding: Sharding = None) -> Adapter:
    """Reads an adapter that `save`, or a manager given `save_items`, has written.

    **Arguments:**

    - `directory`: of `save`, or one step of a `CheckpointManager`.
    - `sharding`: where the leaves go: a `jax.sharding.Sharding`, or a function from a leaf's path and shape to
      one. The default is the first device, whatever devices they were saved from.

    **Raises:** `ValueError` if the directory holds no adapter, or one of a newer format.
    """
    import orbax.checkpoint as ocp

    description = _describe(directory)
    sites = _sites(description)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
    place: Callable[..., Any] = sharding if callable(sharding) else lambda path, shape: sharding
    abstract = {
        path: jax.ShapeDtypeStruct(shape, jnp.dtype(description["dtypes"]["/".join(path)]), sharding=place(path, shape))
        for path, shape in expected_leaves(sites).items()
    }
    target = Adapter.from_leaves(abstract, sites)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(
            _absolute(directory), args=ocp.args.Composite(**{ADAPTER: ocp.args.StandardRestore(target)})
        )
    return found[ADAPTER]


def read_sites(directory: Path) -> tuple[Site, ...]:
    """What a checkpoint adapts, without reading its arrays. **Raises:** as `restore`."""
    return _sites(_describe(directory))


def read_config(directory: Path) -> LoRAConfig | None:
    """The configuration that was saved with the adapter, or None. **Raises:** as `restore`."""
    config = _describe(directory)["config"]
    return None if config is None else LoRAConfig.from_dict(config)


def save_items(adapter: Adapter, config: LoRAConfig | None = None) -> dict[str, Any]:
    """The two items of an adapter, to be saved beside others:

        manager.save(step, args=ocp.args.Composite(**save_items(adapter), optimizer=ocp.args.StandardSave(state)))

    `restore(directory / str(step))` then reads the adapter of that step.
    """
    import orbax.checkpoint as ocp

    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"an Adapter knows what it adapts, a {type(adapter).__name__} does not: make one with "
            "`Adapter.from_leaves(leaves, plan.sites)`, or `lora_jax.nnx.adapter_of(model)`."
        )
    dtypes = {"/".join(path): str(adapter.leaf(path).dtype) for path in expected_leaves(adapter.sites)}
    description = {
        "format": FORMAT,
        "sites": [site.to_dict() for site in adapter.sites],
        "dtypes": dtypes,
        "config": None if config is None else config.to_dict(),
    }
    return {ADAPTER: ocp.args.StandardSave(adapter), LORA: ocp.args.JsonSave(description)}


def _describe(directory: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp
    from etils import epath

    target = epath.Path(_absolute(directory))
    if not (target / LORA).exists() or not (target / ADAPTER).exists():
        here = sorted(p.name for p in target.iterdir()) if target.is_dir() else "nothing"
        raise ValueError(
            f"{directory} is no adapter checkpoint: it should hold `{ADAPTER}` and `{LORA}`, and holds {here}. Name "
            "what `lora_jax.checkpoint.save` wrote, or one step of a manager. (A tree that plain orbax saved is "
            "restored by orbax, into `plan.init(key)`.)"
        )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        description = checkpointer.restore(target, args=ocp.args.Composite(**{LORA: ocp.args.JsonRestore()}))[LORA]
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{directory} has format {description.get('format')!r}, this version reads {FORMAT}: upgrade lora-jax."
        )
    return description


def _sites(description: dict[str, Any]) -> tuple[Site, ...]:
    return tuple(Site.from_dict(site) for site in description["sites"])


def _absolute(directory: Path) -> str:
    """orbax wants absolute paths; those with a scheme, such as `gs://...`, are."""
    text = os.fspath(directory)
    return text if "://" in text else os.path.abspath(text)
