"""Every spot that depends on the versions of jax and flax.

Two stacks are supported: jax 0.10.2 + flax 0.12.8 (Python 3.11) and jax >= 0.11.1 + flax >= 0.12.9 (Python 3.12+).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Literal
from jax.interpreters import partial_eval


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """`(jaxpr, consts)` of an open or a closed jaxpr; jax 0.12 has one class for both."""
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def live_part(jaxpr: Any) -> tuple[Any, list[bool]]:
    """`jaxpr` (same inputs, same outputs) without what reaches no output, and which inputs do reach one."""
    jaxpr = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
    read.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
    return jaxpr, [v in read for v in jaxpr.invars]


def call_jaxpr(params: Mapping[str, Any]) -> Any:
    """The body of a call-like equation (`jit`, `closed_call`, `custom_*_call`)."""
    return params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """`(number of constants, number of carried values)` of a `scan` equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax >= 0.12 keeps trees instead of counts
    return len(consts), len(carry)


def named_as(eqn: Any) -> AbstractContextManager[None]:
    """The `jax.named_scope`s and the source line of an equation, for what is computed in its place."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=names)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation on ordinary values, in the context (mesh, compute type) it was traced in."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        if isinstance(params, tuple):
            functions, params = params
            out = eqn.primitive.bind(*functions, *values, **params)
        else:
            out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def read(env: Mapping[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, Literal) else env[var]


def key_name(key: Any) -> str:
    """One part of a pytree path as the string a user would write."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_names(path: Sequence[Any]) -> tuple[str, ...]:
    """A pytree key path as strings, without the `.value` that boxes (nnx variables, partitioned params) append."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("value", "raw_value"):
        path = path[:-1]
    return tuple(key_name(key) for key in path)


def is_dynamic(leaf: Any) -> bool:
    """Whether a leaf of a call's arguments is traced (arrays) or kept as it is (Python values)."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)
    )


def varying(x: Any) -> frozenset[str]:
    """The mesh axes of an enclosing `shard_map` along which `x` may differ from device to device."""
    return _axes(jax.typeof(x))


def _axes(aval: Any) -> frozenset[str]:
    return getattr(aval, "vma", None) or getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())


def vary_alike(*values: Any) -> tuple[Any, ...]:
    """`values`, each typed as varying along every mesh axis along which any of them does (None stays None)."""
    axes = frozenset().union(*(varying(x) for x in values if x is not None))
    if not axes:
        return values
    # In a fixed order, so that equal programs lower equally.
    missing = [() if x is None else tuple(sorted(axes - varying(x))) for x in values]
    return tuple(lax.pcast(x, m, to="varying") if m else x for x, m in zip(values, missing, strict=True))


def zeros_of(aval: Any) -> Any:
    """Zeros of exactly this type: its shape and dtype, and how it varies or is split over a mesh."""
    zeros = lax.broadcast_in_dim(lax.full((), 0, aval.dtype), aval.shape, (), out_sharding=_explicit(aval))
    axes = tuple(sorted(_axes(aval)))
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def explicit_sharding(x: Any) -> Any:
    """The sharding that is part of `x`'s type, on a mesh with explicit axes; None on any other."""
    return _explicit(jax.typeof(x))


def _explicit(aval: Any) -> Any:
    sharding = aval.sharding
    return sharding if jax.sharding.AxisType.Explicit in (getattr(sharding.mesh, "axis_types", None) or ()) else None


def on_mesh_of(x: Any, like: Any) -> Any:
    """`x` with the mesh of `like`'s type, where that differs: axes explicit in one and automatic in the other."""
    mesh = jax.typeof(like).sharding.mesh
    if jax.typeof(x).sharding.mesh == mesh:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def laid_out_as(x: Any, like: Any) -> Any:
    """`x`, of the shape of `like`, with the explicit sharding of `like` if it has one."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


class Device(NamedTuple):
    """What is compiled for: `cpu`, `cuda`, `rocm` ...; the model's name; of CUDA, where known, the compute capability
    and the number of multiprocessors."""

    platform: str
    kind: str
    capability: tuple[int, int] | None
    multiprocessors: int | None = None


def target_device() -> Device:
    """The device of the mesh in scope, or JAX's default one."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        hopper = any(name in abstract.device_kind for name in ("H100", "H200", "H800", "H20"))
        kind = abstract.device_kind
        # A mesh of types alone says no more than the name, which is that of a whole GPU with all of its parts on.
        whole = 132 if kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200") else abstract.num_cores
        return Device(_platform(abstract.platform, kind), kind, (9, 0) if hopper else None, whole)
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    capability = str(getattr(device, "compute_capability", "")).split(".")
    known = (int(capability[0]), int(capability[1])) if len(capability) == 2 else None
    cores = getattr(device, "core_count", None)
    return Device(_platform(device.platform, device.device_kind), device.device_kind, known, cores)


def _platform(platform: str, kind: str) -> str:
    """JAX calls CUDA and ROCm devices "gpu"; lowering tells them apart."""
    return platform if platform != "gpu" else "cuda" if "NVIDIA" in kind or "Tesla" in kind else "rocm"


def mesh_axis_kinds(x: Any) -> tuple[str, ...]:
    """For each axis of the mesh that `x` lives on, or that is in scope: manual, explicit or auto."""
    mesh = jax.typeof(x).sharding.mesh if hasattr(x, "aval") else None
    if mesh is None or mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
    return tuple(str(kind.name).lower() for kind in (mesh.axis_types or ()))
