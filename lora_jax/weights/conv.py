"""The low-rank branch of a convolution: a convolution to `rank` channels, then a 1x1 product.

    delta[k..., c, o] = scale * sum_r A[k..., c, r] * B[r, o]

With feature groups the kernel sees `c` = in_channels / groups, so each group is convolved with the same A and
meets its own slice of B's outputs; this equals the grouped convolution with the merged kernel.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax.ops.contract import contract, reorder
from lora_jax.ops.low_rank import scaled
from lora_jax.weights.virtual import Dims

RANK = "rank"
Named = tuple[jax.Array, tuple[Hashable, ...]]


def low_rank_conv(
    eqn: Any, x: jax.Array, dims: Dims, a: Named, b: Named, scale: float, rescaling: float = 1.0
) -> jax.Array | None:
    """`scale * conv(conv(x, A), B)` for the convolution of `eqn`, or None where the axes do not fit it.

    `dims` are the kernel's dimensions in atoms. A must carry the kernel's input and spatial axes, B the
    output axis. `rescaling` multiplies the wide sums of the first convolution: dropout's.
    """
    params = eqn.params
    numbers = params["dimension_numbers"]
    out_dim = numbers.rhs_spec[0]
    groups = params["feature_group_count"]
    inner = tuple(atom for d, dim in enumerate(dims) if d != out_dim for atom in dim)
    if params["batch_group_count"] != 1 or set(a[1]) != {*inner, RANK} or set(b[1]) != {RANK, *dims[out_dim]}:
        return None
    rank = a[0].shape[a[1].index(RANK)]
    # A with the kernel's own layout: its output channels are the rank.
    order = tuple(name for d, dim in enumerate(dims) for name in ((RANK,) if d == out_dim else dim))
    shape = list(eqn.invars[1].aval.shape)
    shape[out_dim] = rank
    kernel = reorder(a[0], a[1], order).reshape(shape).astype(x.dtype)
    if _compat.explicit_sharding(x):  # else the derivative by a factor that was never placed on the mesh is refused
        kernel = _compat.on_mesh_of(kernel, x)
    if groups > 1:
        kernel = jnp.concatenate([kernel] * groups, axis=out_dim)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    down = lax.conv_general_dilated(x, kernel, **{**params, "preferred_element_type": wide})
    down = (down * jnp.asarray(rescaling, wide)).astype(x.dtype)
    # (..., groups * rank, ...) x (groups, rank, out / groups) on the feature axis.
    feature = numbers.out_spec[1]
    outputs = eqn.outvars[0].aval.shape[feature]
    split = (*down.shape[:feature], groups, rank, *down.shape[feature + 1 :])
    up = scaled(reorder(b[0], b[1], (RANK, *dims[out_dim])), scale, x.dtype)
    rows = [f"n{i}" for i in range(down.ndim - 1)]
    names = (*rows[:feature], "g", RANK, *rows[feature:])
    result = contract(
        down.reshape(split), names, up.reshape(rank, groups, outputs // groups), (RANK, "g", "o"),
        (*rows[:feature], "g", "o", *rows[feature:]), preferred_element_type=eqn.outvars[0].aval.dtype,
    )  # fmt: skip
    return result.reshape(eqn.outvars[0].aval.shape)
