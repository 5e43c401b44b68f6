"""Every adapted parameter as a stack of matrices; `lora_jax.algebra` has their factors."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import _compat
from lora_jax.sites import Site


def as_matrices(site: Site, w: Any) -> jax.Array:
    """`(lead, in, out)` of an array of the parameter's shape, each axis flattened, in float32 or wider.

    On a mesh with explicit axes the result is whole on every device.
    """
    w = _compat.whole(jnp.asarray(w))
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    split = wide.reshape([atom.size for atom in site.atoms])
    order = [n for role in "lio" for n, letter in enumerate(site.roles) if letter == role]
    return split.transpose(order).reshape(math.prod(site.sizes_of("l")), site.fan_in, site.fan_out)


def as_parameter(site: Site, matrices: jax.Array) -> jax.Array:
    """The inverse of `as_matrices`, in the dtype of `matrices`."""
    order = [n for role in "lio" for n, letter in enumerate(site.roles) if letter == role]
    split = matrices.reshape([site.atoms[n].size for n in order])
    return split.transpose([order.index(n) for n in range(len(order))]).reshape(site.shape)
