"""The plan: which parameters a configuration adapts, how, and why the others are left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tracing
from lora_jax.adapters import Adapter, check_places
from lora_jax.config import LoRAConfig
from lora_jax.initialisers import init_bias, init_factors
from lora_jax.interpret import Interpreter
from lora_jax.layout import layout_of, stated_layout
from lora_jax.rows import Row
from lora_jax.selection import select
from lora_jax.sites import LORA_A, LORA_B, LORA_BIAS, MAGNITUDE, TOKENS, Site
from lora_jax.status import trainable_parameters
from lora_jax.token_rows import rows_of
from lora_jax.undropped import InertDropoutWarning, dropout_note, has_dropout
from lora_jax.weights.norms import norms
from lora_jax.weights.probe import Probe, Record, probe_weight
from lora_jax.weights.virtual import Virtual


@dataclass(frozen=True)
class Plan:
    """What `lora_jax.plan` found. `print(plan)` shows it as a table.

    **Fields:**

    - `config`: the configuration it was made from.
    - `sites`: one per adapted parameter.
    - `rows`: one per parameter of the model, adapted or not, with the reason.
    - `materialised`: `(parameter, primitive, shape)` for each place where an adapted weight has to be formed in
      full because no rule carries it through that primitive: right, but slower.
    """

    config: LoRAConfig
    sites: tuple[Site, ...]
    rows: tuple[Row, ...] = field(repr=False)
    materialised: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    def init(self, key: jax.Array, params: Any = None) -> Adapter:
        """A new adapter. Each site's factors depend on `key` and the site's name only.

        **Arguments:** `params` is needed only with `modules_to_save`, whose copies start at the base's values, and with
        `use_dora`, whose magnitudes start at the norms of the base with its factors.

        **Raises:** `ValueError` if either is used and `params` is not given.
        """
        values: dict[tuple[str, ...], Any] = {}
        if needy := [site for site in self.sites if site.is_full or site.tokens or site.dora]:
            if params is None:
                what = "`use_dora` starts at the norms" if needy[0].dora else "the plan trains copies"
                raise ValueError(
                    f"{what} of {', '.join(s.name for s in needy[:3])}{', …' if len(needy) > 3 else ''}: pass the base "
                    "parameters, `plan.init(key, params)`."
                )
            paths, leaves, _ = tracing.flatten_params(params)
            values = dict(zip(paths, leaves, strict=True))
        out: dict[tuple[str, ...], Any] = {}
        for site in self.sites:
            if site.is_full:
                # A copy: the base stays the base's. As precise as the factors, since it is trained like them.
                value = values[site.path]
                out[site.path] = jnp.array(value, jnp.promote_types(value.dtype, self.config.dtype))
            elif site.tokens:
                own = rows_of(site, values[site.path])
                out[site.leaf_path(TOKENS)] = own.astype(jnp.promote_types(own.dtype, self.config.dtype))
            else:
                a, b = init_factors(site, key, self.config.init, self.config.dtype)
                out[site.leaf_path(LORA_A)], out[site.leaf_path(LORA_B)] = a, b
                if site.dora:
                    out[site.leaf_path(MAGNITUDE)] = norms(site, values[site.path], a, b).astype(a.dtype)
                if site.lora_bias:
                    out[site.leaf_path(LORA_BIAS)] = init_bias(site, key, self.config.init, self.config.dtype)
        return Adapter.from_leaves(out, self.sites)

    def count(self) -> int:
        """Number of trainable parameters."""
        return sum(site.parameters for site in self.sites)

    def count_all(self) -> int:
        """Number of parameters of the base."""
        return sum(row.size for row in self.rows)

    def summary(self) -> str:
        """PEFT's line: `trainable params: 896 || all params: 20,768 || trainable%: 4.3143`."""
        return trainable_parameters(self.count(), self.count_all() + self.count())

    def __str__(self) -> str:
        from lora_jax.table import plan_table

        return plan_table(self)


def plan(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    config: LoRAConfig,
    axis_roles: Mapping[str, str] | None = None,
    materialise: str = "report",
    **kwargs: Any,
) -> Plan:
    """Finds what `config` adapts in `fn(params, *args, **kwargs)`, by one abstract trace.

    **Arguments:**

    - `fn`: any function of a parameter pytree. `params` and arrays in `args` may be `jax.ShapeDtypeStruct`s;
      nothing is computed or allocated.
    - `axis_roles`: `{parameter name: letters}` where the trace cannot tell or should be overruled: one letter
      per axis, `l` (stacked), `i` (in), `o` (out).
    - `materialise`: `"report"`, or `"error"` to refuse a plan that must form an adapted weight in full.

    **Returns:** a `Plan`.

    **Warns:** `InertDropoutWarning` if the configuration's dropout would act nowhere.

    **Raises:** `ValueError` naming every entry of the configuration that matches nothing that can be adapted,
    with the closest names; or, with `materialise="error"`, the weights that would be formed.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"`config` must be a LoRAConfig, got {type(config).__name__}.")
    if materialise not in ("report", "error"):
        raise ValueError(f"`materialise={materialise!r}`: write 'report' or 'error'.")
    if jax.tree_util.all_leaves([params]):
        raise TypeError(
            f"`params` is a bare {type(params).__name__}, and a parameter needs a name: wrap it in a dictionary, "
            "such as {'kernel': ...}, and let the function take that."
        )
    records, traced = _observe(fn, params, args, kwargs)
    stated = dict(axis_roles or {})
    layouts = {}
    for path, leaf in zip(traced.paths, traced.inputs, strict=False):
        name = ".".join(path)
        layouts[path] = (
            stated_layout(stated.pop(name), tuple(leaf.shape))
            if name in stated
            else layout_of(records[path], tuple(leaf.shape))
            if path in records
            else "a scalar"
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else "not floating point"
        )
        if len(leaf.shape) > 1 and path in records and path in traced.unused and name not in (axis_roles or {}):
            layouts[path] = traced.unused[path]
    if stated:
        raise ValueError(f"`axis_roles` names no parameter: {', '.join(sorted(stated))}.")
    leaves = {p: x for p, x in zip(traced.paths, traced.inputs, strict=False)}
    sites, rows = select(config, leaves, layouts)
    check_places(sites)
    _check_full(sites, traced.unused)
    formed = tuple(
        (site.name, dense.primitive, dense.shape)
        for site in sites
        if not site.is_full
        for dense in records[site.path].dense
        if not (dense.lookup and site.op == "embedding")
    )
    if formed and config.lora_bias:
        raise ValueError(
            "`lora_bias` adds to the products of a weight, and these weights are formed in full: "
            + "; ".join(f"`{name}` {shape} by `{primitive}`" for name, primitive, shape in formed)
            + ". Leave them out with `exclude_modules`."
        )
    if formed and materialise == "error":
        lines = "; ".join(f"`{name}` {shape} by `{primitive}`" for name, primitive, shape in formed)
        raise ValueError(
            f"these adapted weights would be formed in full at every call: {lines}. Leave them out with "
            "`exclude_modules`, or accept it with `materialise='report'`."
        )
    if config.dropout > 0 and sites:
        rows = _with_dropout_notes(rows, records, {name for name, _, _ in formed})
        if not any(has_dropout(records[site.path], site) for site in sites if site.is_low_rank):
            warnings.warn(
                f"`dropout={config.dropout}` has no effect on this model: none of the {len(sites)} adapted parameters "
                "is used in a product that drops its input (`print(plan)` says why). Write `dropout=0.0`, or target "
                "weights that are multiplied by.",
                InertDropoutWarning,
                stacklevel=2,
            )
    return Plan(config, sites, rows, formed)


def _with_dropout_notes(
    rows: tuple[Row, ...], records: Mapping[tuple[str, ...], Record], formed: set[str]
) -> tuple[Row, ...]:
    return tuple(
        row
        if row.site is None or not row.site.is_low_rank
        else replace(row, note=dropout_note(records[row.path], row.site, row.name in formed))
        for row in rows
    )


def _check_full(sites: tuple[Site, ...], unused: Mapping[tuple[str, ...], str]) -> None:
    """Raises on copies of `modules_to_save` that no training could change."""
    problems = [
        f"`{site.name}` {site.shape}: {unused[site.path]}" for site in sites if site.is_full and site.path in unused
    ]
    if problems:
        raise ValueError(
            "`modules_to_save` names parameters that cannot train: " + "; ".join(problems) + ". Leave them out."
        )


def _observe(fn: Any, params: Any, args: Any, kwargs: Any) -> tuple[dict[tuple[str, ...], Record], tracing.Traced]:
    """Runs the interpreter abstractly with every floating-point parameter under observation."""
    traced = tracing.trace(fn, params, args, kwargs)
    records: dict[tuple[str, ...], Record] = {}

    def seen_dense(w: Virtual, primitive: str) -> None:
        assert isinstance(w.kind, Probe)
        w.kind.seen_dense(w, primitive)

    def run(values: list[Any]) -> None:
        inputs = list(values)
        for i, path in enumerate(traced.paths):
            if jnp.issubdtype(inputs[i].dtype, jnp.floating) and inputs[i].ndim > 0:
                inputs[i] = probe_weight(path, inputs[i])
                records[path] = inputs[i].kind.record
        Interpreter(seen_dense).run_dense(traced.jaxpr, traced.consts, inputs)

    jax.eval_shape(run, traced.inputs)
    return records, traced
