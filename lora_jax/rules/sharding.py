"""`shard_map` around a product: each device gets its part of the base and of the factors that carry the split axes.

The dropout key is the same on all devices, as it is for a model that draws its own masks inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax import _compat
from lora_jax.rules import rule
from lora_jax.sites import Atom
from lora_jax.weights.virtual import Virtual, is_virtual


@rule("shard_map")
def shard_map(interpreter: Any, eqn: Any, ins: Sequence[Any]) -> list[Any]:
    """A weight whose split does not fall on its atoms is formed before it goes in."""
    p = eqn.params
    jaxpr, consts = _compat.open_jaxpr(p["jaxpr"])
    values, specs, insides = [], [], []
    for x, spec in zip(ins, p["in_specs"], strict=True):
        split = _split(x, spec, p["mesh"]) if is_virtual(x) else None
        if split is None and is_virtual(x) and x.kind.watches:  # formed, and watched on as what it was formed into
            x = x.kind.joined([x], interpreter.dense(x, "shard_map"))
            split = _split(x, spec, p["mesh"])
        if split is None:
            values.append(interpreter.dense(x, "shard_map"))
            specs.append(spec)
            insides.append(None)
        else:
            values.append(x)
            specs.append(_specs(x, spec, split))
            insides.append(tuple(sorted({**dict(x.sizes), **{a: size for a, (_, size) in split.items()}}.items())))

    def body(*local: Any) -> list[Any]:
        views = [x if s is None else x.replace(sizes=s) for x, s in zip(local, insides, strict=True)]
        inside = interpreter.nested()

        def run() -> list[Any]:
            return [inside.dense(y, "shard_map") for y in inside.run(jaxpr, consts, views)]

        return interpreter.recorder.around(run, {})[0]  # what a device sees is its part only

    mapped = jax.shard_map(
        body, mesh=p["mesh"], in_specs=tuple(specs), out_specs=list(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]), check_vma=p["check_vma"],
    )  # fmt: skip
    return mapped(*values)


def _split(w: Virtual, spec: Any, mesh: Any) -> dict[Atom, tuple[Any, int]] | None:
    """For each atom that the spec divides, the mesh axes and the size of one part; None if parts cut atoms."""
    if getattr(spec, "unreduced", ()) or getattr(spec, "reduced", ()):
        return None
    split: dict[Atom, tuple[Any, int]] = {}
    for dim, names in zip(w.dims, spec, strict=False):
        if names is None:
            continue
        if names is PartitionSpec.UNCONSTRAINED:
            return None
        parts = math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
        # Devices take contiguous parts, so it is the outermost atom that is divided.
        if parts > 1 and (not dim or w.size(dim[0]) % parts or dim[0].is_repeat):
            return None
        if dim:
            split[dim[0]] = (names, w.size(dim[0]) // parts)
    return split


def _specs(w: Virtual, spec: Any, split: Mapping[Any, tuple[Any, int]]) -> Virtual:
    """The specs of a view's arrays, in a view."""
    of = {name: PartitionSpec(*(split.get(axis, (None,))[0] for axis in axes)) for name, axes in w.axes}
    return w.replace(base=spec, factors=of, key=None if w.key is None else PartitionSpec())
