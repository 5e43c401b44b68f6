"""Plans and configurations from a PEFT directory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_jax.config import LoRAConfig
from lora_jax.peft_config import from_peft, without_init
from lora_jax.peft_matching import is_target, names_targets
from lora_jax.planning import Plan, plan
from lora_jax.sites import Site
from lora_jax.targets import ROUTERS

from .naming import Naming
from .peft_full import lone_biases
from .peft_keys import PARAMETER_ORDER, PREFIX
from .peft_load import read_sites, widen
from .peft_names import Names, as_naming, place_each, with_stacks
from .peft_read import AdapterFile, read_sorted
from .peft_settings import group_of
from .peft_tensors import Placement
from .peft_tokens import planned_tokens


def config_for(directory: str | Path) -> LoRAConfig:
    """The `LoRAConfig` of a PEFT directory: what `from_peft` makes of its configuration.

    Of `modules_to_save` only what the file has tensors for is kept: PEFT writes both `classifier` and `score` for
    every sequence classifier. Names of targets are PyTorch's. Where the Flax model's differ by more than `layers_0`
    for `layers.0`, or it stacks layers, use `plan_peft`.

    **Raises:** as `read_peft` and `from_peft`.
    """
    file = read_sorted(directory)
    file.raise_if_any()
    data = without_init(file.config)
    beside = {*file.strays, *lone_biases(file.full)}
    modules = {name.rpartition(".")[0] for name in file.full if name not in beside}
    kept = [e for e in data.get("modules_to_save") or () if any(_names(e, m) for m in modules)]
    data["modules_to_save"] = [*kept, *sorted(m for m in modules if not any(_names(e, m) for e in kept))]
    return from_peft(data)


def plan_peft(
    directory: str | Path,
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    names: Names = None,
    tied: Mapping[str, str] | None = None,
    parameter_order: Sequence[str] = PARAMETER_ORDER,
    dtype: Any = "float32",
    axis_roles: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Plan:
    """The plan that adapts in `fn(params, *args, **kwargs)` exactly what a PEFT directory adapts.

    Which parameters, ranks and alphas is read from the tensors, through the name table; dropout and rsLoRA from the
    configuration. `load_peft(directory, plan, ...)` with the same `names` and `tied` then fits.

    **Arguments:** `fn`, `params`, `args`, `kwargs`, `axis_roles` as in `lora_jax.plan`; `names`, `tied`,
    `parameter_order` as in `save_peft`; `dtype` of the factors.

    **Raises:** `ValueError` as `load_peft`; among others for modules of the file that the model does not have.
    """
    file = widen(read_sorted(directory), dtype)
    naming = as_naming(names)
    # Everything that can be adapted, routers included (a pattern must spell those out); then what the file has.
    everything = LoRAConfig(target_modules=f".*|{'|'.join(sorted(ROUTERS))}", rank=1, alpha=1)
    broad = plan(fn, params, *args, config=everything, axis_roles=axis_roles, **kwargs)
    found = place_each(broad.sites, naming)
    chosen = [site for site in broad.sites if isinstance(p := found[site.path], Placement) and _in_file(file, p)]
    file.problems += _targeted_but_absent(file, [p for p in found.values() if isinstance(p, Placement)])
    tokens = planned_tokens(file, found)
    group = group_of(file.config)
    chosen = [replace(site, group=group) for site in chosen if site.name not in tokens]
    by_rows = [
        replace(site, rank=len(rows), alpha=float(len(rows)), tokens=rows)
        for site in broad.sites
        if (rows := tokens.get(site.name))
    ]
    own = {site.path for site in (*chosen, *by_rows)}
    tables = {site.path for site in broad.sites if site.tied and site.op == "embedding"}
    naming = with_stacks(broad.sites, naming)
    full = [
        Site(row.path, row.shape, row.dtype, "full", tied=row.path in tables)
        for row in broad.rows
        if row.path not in own and _is_full(file, row.path, row.shape, naming)
    ]
    if not chosen:
        file.problems.append(
            f"none of the modules is in the model, whose own are called "
            f"{', '.join(p.names[0] for p in list(found.values())[:3] if isinstance(p, Placement))}, …: say the names, "
            "`names=…`"
        )
        file.raise_if_any()
    kept = {site.path for site in full}
    partly = {row.path[:-1] for row in broad.rows if row.path not in kept}
    # Without `params`: the base weights beside an embedding's factors are `load_peft`'s to compare.
    file.bases.clear()
    sites, _ = read_sites(file, [*chosen, *by_rows, *full], naming, tied, None, parameter_order)
    adapted = [site for site in sites if site.is_low_rank]
    rank, alpha = (Counter(getattr(s, x) for s in adapted).most_common(1)[0][0] for x in ("rank", "alpha"))
    config = LoRAConfig(
        rank=rank,
        alpha=alpha,
        target_modules="|".join(re.escape(site.name) for site in adapted),
        rank_pattern={f"^{re.escape(s.name)}": s.rank for s in adapted if s.rank != rank},
        alpha_pattern={f"^{re.escape(s.name)}": s.alpha for s in adapted if s.alpha != alpha},
        # PEFT trains a bias without the rest of its module: such a one by its own name.
        modules_to_save=sorted({site.name if site.path[:-1] in partly else site.module for site in full}),
        lora_bias=bool(file.config.get("lora_bias")),
        use_qalora=group > 1,
        qalora_group_size=group,
        trainable_token_indices=tokens,
        layer_replication=file.config.get("layer_replication"),
        use_rslora=bool(file.config.get("use_rslora")),
        use_dora=bool(file.config.get("use_dora")),
        dropout=file.config.get("lora_dropout") or 0.0,
        dtype=dtype,
    )
    return plan(fn, params, *args, config=config, axis_roles=axis_roles, **kwargs)


def _names(entry: str, module: str) -> bool:
    """Whether an entry of `modules_to_save` names a module or one it lies in, on whole parts."""
    return re.search(rf"(^|\.){re.escape(entry)}($|\.)", module) is not None


def _in_file(file: AdapterFile, place: Placement) -> bool:
    if place.kind != "parameter":
        return any(name in file.pairs for name in place.names)
    entries = file.config.get("target_parameters") or ()
    return any(name == e or name.endswith(f".{e}") for name in place.names for e in entries)


def _targeted_but_absent(file: AdapterFile, placed: Sequence[Placement]) -> list[str]:
    """Modules that the configuration targets and the file has no factors for: PEFT would leave them the base's."""
    if not names_targets(file.config):
        return []
    return [
        f"missing: {PREFIX}{name}, which the configuration targets; if it was not adapted, add it to `exclude_modules` "
        "there"
        for place in placed
        if place.kind != "parameter"
        for name in place.names
        if name not in file.pairs and is_target(file.config, name)
    ]


def _is_full(file: AdapterFile, path: tuple[str, ...], shape: tuple[int, ...], naming: Naming) -> bool:
    path = path[1:] if path[0] == "params" and len(path) > 1 else path
    patterns = [re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(name)) for name in naming.target(path, len(shape)).names]
    return any(re.fullmatch(pattern, name) for pattern in patterns for name in file.full)
