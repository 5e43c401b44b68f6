"""Runs a function of one device's part where operands may be split over devices.

A kernel under `jit` is a black box: XLA would gather its operands whole on every device, without a word. So, by the
mesh in scope:

- one device, or inside `shard_map` over all axes of the mesh: what is seen is the device's part already;
- a mesh with explicit axes: the types say how operands are split, and `shard_map` hands out the parts;
- else (automatic): `custom_partitioning`. The compiler says how it has split the operands, the rule below says which
  splits go together, and the function is run on the parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding

from lora_jax import _compat
from lora_jax.ops.contract import Axes
from lora_jax.ops.split import NOT_SPLIT, Split, split_of


def split_over_devices(
    local: Callable[..., tuple[jax.Array, ...]],
    by_xla: Callable[..., tuple[jax.Array, ...]],
    anywhere: Callable[[Any, Any], Any],
    axes: Sequence[Axes],
    out_axes: Sequence[Axes],
    *,
    size: Mapping[Hashable, int],
    rows: Axes,
    wishes: Sequence[int],
    summed: Axes,
    alike: Sequence[Axes] = (),
) -> Callable[..., Sequence[jax.Array]]:
    """A function of whole operands of axes `axes` from `local(split, *parts)`.

    `by_xla`: the same without kernels. `anywhere(kernels, xla)` makes one function of both.
    `wishes`: which operands decide on the split, the first with its `rows` only. `summed`: axes of no result. `size`,
    `alike`: see `split_of`; axes without a size are not split.
    """

    def wanted(specs: Sequence[Any]) -> list[tuple[Axes, Any]]:
        first = [(tuple(n if n in rows else None for n in axes[i]), specs[i]) for i in wishes[:1]]
        return [*first, *((axes[i], specs[i]) for i in wishes[1:])]

    def run(*operands: Any) -> Sequence[jax.Array]:
        kinds = set(_compat.mesh_axis_kinds(operands[0]))
        if kinds == {"explicit"}:
            return _explicit(operands)
        # A program may be compiled for more devices than there are here: those of the mesh in scope.
        if kinds == {"manual"} or max(jax.device_count(), jax.sharding.get_abstract_mesh().size) == 1:
            return both(NOT_SPLIT, *operands)
        return anywhere(_automatic, functools.partial(by_xla, NOT_SPLIT))(*operands)

    def both(split: Split, *parts: Any) -> Sequence[jax.Array]:
        return anywhere(functools.partial(local, split), functools.partial(by_xla, split))(*parts)

    def _explicit(operands: Sequence[Any]) -> Sequence[jax.Array]:
        mesh = jax.typeof(operands[0]).sharding.mesh
        specs = [jax.typeof(x).sharding.spec for x in operands]
        split = split_of(size, mesh.shape, *wanted(specs), alike=alike)
        ins, outs = (tuple(split.spec(a) for a in group) for group in (axes, out_axes))
        parts = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, ins, strict=True)]
        body = jax.shard_map(functools.partial(both, split), mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
        return body(*parts)

    def _automatic(*operands: Any) -> Sequence[jax.Array]:
        call = custom_partitioning(functools.partial(local, NOT_SPLIT))

        def partition(mesh: Any, args: Any, results: Any) -> Any:
            shardings = [arg.sharding for arg in args]
            if not all(isinstance(s, NamedSharding) for s in shardings):
                raise ValueError(
                    "a fused LoRA product over several devices needs shardings with named mesh axes, and got "
                    f'{shardings[0]}. Use `jax.NamedSharding`, or implementation="xla".'
                )
            split = split_of(size, mesh.shape, *wanted([s.spec for s in shardings]), alike=alike)
            ins, outs = (tuple(NamedSharding(mesh, split.spec(a)) for a in group) for group in (axes, out_axes))
            return mesh, functools.partial(local, split), outs, ins

        rule, kept = _rule(axes, out_axes, size)
        call.def_partition(
            partition, sharding_rule=rule, need_replication_factors=kept,
            reduction_factors=tuple(f for name, f in _factors(axes).items() if name in summed),
        )  # fmt: skip
        return call(*operands)

    return run


def _factors(axes: Sequence[Axes]) -> dict[Any, str]:
    """A short name for each axis."""
    names = dict.fromkeys(name for group in axes for name in group)
    return {name: f"f{i}" for i, name in enumerate(names)}


def _rule(axes: Sequence[Axes], out_axes: Sequence[Axes], size: Mapping[Hashable, int]) -> tuple[str, tuple[str, ...]]:
    """The sharding rule in Shardy's notation, and the factors that may not be split, in the order of the rule."""
    factor = _factors((*axes, *out_axes))
    ins, outs = (", ".join(" ".join(factor[n] for n in group) for group in groups) for groups in (axes, out_axes))
    return f"{ins} -> {outs}", tuple(f for name, f in factor.items() if name not in size)
