"""Norms of W + s·A·B over a site's in axes, without forming A·B.

    |W + s·A·B|² = |W|² + 2s·<W, A·B> + s²·|A·B|²,    <W, A·B> = sum_r B·(Aᵀ·W),    |A·B|² = sum_rq B·(Aᵀ·A)·B

Two thin products with W's in axes summed: one pass over W, and nothing of its size is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax.ops.contract import contract, reorder, reordered_sharding, spread
from lora_jax.sites import Site

RANK = "rank"
OTHER = "rank'"


def norms(site: Site, w: Any, a: Any, b: Any) -> jax.Array:
    """`|W + s·A·B|` of shape (*lead, *out), in float32 (float64 for a float64 base); no gradient flows through it.

    A 16-bit W is not copied to float32: A is rounded to its dtype beside it, as the product itself rounds it.

    **Source:** the identity as in the module; its use for DoRA was asked for in PEFT's issue 3387.
    """
    w, a, b = lax.stop_gradient((jnp.asarray(w), jnp.asarray(a), jnp.asarray(b)))
    lead, inner, outer = site.atoms_of("l"), site.atoms_of("i"), site.atoms_of("o")
    kept = (*lead, *outer)
    wide = jnp.promote_types(w.dtype, jnp.float32)
    sizes = tuple(atom.size for atom in site.atoms)
    w = w if w.shape == sizes else w.reshape(sizes)
    pair = functools.partial(contract, precision=lax.Precision.HIGHEST, preferred_element_type=wide)
    square = reorder(
        jnp.sum(jnp.square(w.astype(wide)), [d for d, atom in enumerate(site.atoms) if atom in inner]),
        [atom for atom in site.atoms if atom not in inner],
        kept,
    )
    down = pair(
        a.astype(w.dtype), (*lead, *inner, RANK), w, site.atoms, (*lead, RANK, *outer),
        out_sharding=reordered_sharding(_compat.explicit_sharding(w), site.atoms, (*lead, RANK, *outer)),
    )  # fmt: skip
    a, b = a.astype(wide), b.astype(wide)
    gram = pair(a, (*lead, *inner, RANK), a, (*lead, *inner, OTHER), (*lead, RANK, OTHER))
    through = pair(gram, (*lead, RANK, OTHER), b, (*lead, OTHER, *outer), (*lead, RANK, *outer))
    through = _compat.laid_out_as(through, down)
    b = _compat.laid_out_as(b, down)
    change = jnp.sum(b * (2 * down + site.scale * through), len(lead))
    # Rounding may leave a negative number where the change takes the whole of a column away.
    return jnp.sqrt(jnp.maximum(square + site.scale * change, 0))


def magnitude_scale(norm: jax.Array, magnitude: Any) -> jax.Array:
    """`magnitude / norm`, both (*lead, *out); 1 where the norm is 0, since there is nothing to give a length to."""
    magnitude = _compat.laid_out_as(jnp.asarray(magnitude).astype(norm.dtype), norm)
    empty = norm == 0
    return jnp.where(empty, 1, magnitude / jnp.where(empty, 1, norm))


def over_parameter(site: Site, c: jax.Array) -> jax.Array:
    """An array of shape (*lead, *out) repeated along the in axes, in the shape of the site's parameter."""
    c = spread(c, (*site.atoms_of("l"), *site.atoms_of("o")), site.atoms)
    return jnp.broadcast_to(c, [atom.size for atom in site.atoms]).reshape(site.shape)
