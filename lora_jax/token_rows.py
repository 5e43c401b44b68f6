"""Which rows of which embedding tables are trained (`trainable_token_indices`), and what stands for them.

Overwriting rows is a low-rank change: A has a column for each trained row with a single 1 in it, and B holds the rows'
differences from the base's. So lookups, tied heads and everything else work as for any factors, and nothing of the
table's size is copied but A.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import targets
from lora_jax.config import LoRAConfig
from lora_jax.layout import Layout
from lora_jax.rows import Path, Row
from lora_jax.sites import Site


def with_tokens(config: LoRAConfig, rows: list[Row], layouts: Mapping[Path, Layout | str]) -> list[Row]:
    """The rows of the plan with the sites of `trainable_token_indices`.

    **Raises:** `ValueError` for a name that is no table or several, a table that is trained otherwise as well, and rows
    that the table does not have.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return rows
    tables = {row.path: layouts[row.path] for row in rows if row.op == "embedding"}
    chosen: dict[Path, tuple[int, ...]] = {}
    for name, tokens in wanted.items() if isinstance(wanted, Mapping) else [("", wanted)]:
        found = _named(name, tables)
        if len(found) != 1:
            listed = ", ".join(f"`{'.'.join(path[:-1])}`" for path in (found or tables)) or "none at all"
            raise ValueError(
                f"`trainable_token_indices` needs one table that is looked up{f' called `{name}`' if name else ''}: "
                f"{'it could be any of' if found else 'the model has'} {listed}. Write {{'name': {list(tokens)}}}."
            )
        chosen[found[0]] = tuple(tokens)
    return [_trained(row, tables[row.path], chosen[row.path]) if row.path in chosen else row for row in rows]


def _named(name: str, tables: Iterable[Path]) -> list[Path]:
    """The tables of this name; those that it spells out in full, if there are any."""
    if not name:
        return list(tables)
    matches = {path: targets.Patterns([name]).match(path) for path in tables}
    exact = [path for path, match in matches.items() if match and match[1]]
    return exact or [path for path, match in matches.items() if match]


def _trained(row: Row, layout: Layout | str, tokens: tuple[int, ...]) -> Row:
    if row.site is not None:
        raise ValueError(
            f"`{row.name}` is trained by `trainable_token_indices` and by `target_modules` or `modules_to_save`: "
            "choose one of them for it."
        )
    assert isinstance(layout, Layout)
    site = Site(
        path=row.path, shape=row.shape, dtype=row.dtype, op="embedding", atoms=layout.atoms, roles=layout.roles,
        rank=len(tokens), alpha=float(len(tokens)), tied=layout.tied, tokens=tokens,
    )  # fmt: skip
    if site.roles.count("i") != 1 or "l" in site.roles or max(tokens) >= site.fan_in:
        raise ValueError(
            f"`{row.name}` {row.shape} has {site.fan_in} rows with roles {site.roles}, and "
            f"`trainable_token_indices` asks for row {max(tokens)}: rows count from 0, of tables with one axis of them."
        )
    return replace(row, site=site, note=f"{len(tokens)} rows trained")


def rows_of(site: Site, base: Any) -> jax.Array:
    """The base's own rows, (token, *out): where their training starts."""
    return jnp.take(jnp.moveaxis(jnp.asarray(base), _axis(site), 0), jnp.asarray(site.tokens), axis=0)


def with_rows(site: Site, base: Any, rows: Any) -> jax.Array:
    """The base with its rows replaced."""
    axis = _axis(site)
    moved = jnp.moveaxis(jnp.asarray(base), axis, 0).at[jnp.asarray(site.tokens)].set(jnp.asarray(rows, base.dtype))
    return jnp.moveaxis(moved, 0, axis)


def token_factors(site: Site, base: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
    """A (vocabulary, token), one-hot in the base's dtype, which holds it exactly; B (token, *out) in float32."""
    wide = jnp.promote_types(jnp.promote_types(base.dtype, rows.dtype), jnp.float32)
    own = jax.lax.stop_gradient(rows_of(site, base)).astype(wide)
    return jax.nn.one_hot(jnp.asarray(site.tokens), site.fan_in, axis=0, dtype=base.dtype), rows.astype(wide) - own


def _axis(site: Site) -> int:
    return site.atoms_of("i")[0].axis
