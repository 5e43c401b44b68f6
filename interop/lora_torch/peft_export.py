"""What each reader of PEFT directories can take: tensors and configuration of one export.

peft    everything, with scales in the configuration (PEFT, transformers)
vllm    2-D factors only, one rank, scale 1: the scale is folded into B
gguf    as vllm, for llama.cpp's `convert_lora_to_gguf.py`, which knows one alpha and no rsLoRA
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_jax.config import LoRAConfig
from lora_jax.peft_config import plain_number, to_peft
from lora_jax.sites import LORA_BIAS, MAGNITUDE
from lora_jax.targets import saved_by

from .peft_tensors import Factors, Placement, fold

TARGETS = ("peft", "vllm", "gguf")
_VARIANTS = {MAGNITUDE: "DoRA", LORA_BIAS: "`lora_bias`"}


@dataclass(frozen=True)
class Module:
    """One adapted torch module of an export; `name` includes the parameter for kind `"parameter"`."""

    name: str
    kind: str
    factors: Factors
    alpha: float
    rslora: bool
    group: int = 1


def module_of(place: Placement, name: str, factors: Factors) -> Module:
    """A module of `place`; block structures have a larger rank than the site, and alpha grows with it."""
    site = place.site
    grown = factors.rank / site.rank
    alpha = site.alpha * (grown**0.5 if site.rslora else grown) if grown != 1 else site.alpha
    return Module(name, "linear" if name in place.heads else place.kind, factors, alpha, site.rslora, site.group)


def refuse(
    target: str, places: Sequence[Placement], full: Sequence[str], conv1d: bool, replicated: bool = False
) -> None:
    """Raises a `ValueError` listing everything that `target` cannot read, each with the reason."""
    if target not in TARGETS:
        raise ValueError(f"`target={target!r}` is unknown; use one of {', '.join(map(repr, TARGETS))}.")
    _refuse_variants(places)
    if target == "peft":
        return
    reader = {"vllm": "vLLM", "gguf": "llama.cpp's convert_lora_to_gguf.py"}[target]
    problems = [f"{name}: {reader} takes no modules trained in full" for name in full]
    if replicated:
        problems.append(f"`layer_replication`: {reader} repeats no layers")
    for place in places:
        names = ", ".join(place.names)
        if place.site.group > 1:
            problems.append(f"{names}: {reader} does not read QALoRA")
        if place.site.vectors:
            problems.append(f"{names}: {reader} does not read {_VARIANTS[place.site.vectors[0]]}")
        if place.kind == "conv":
            problems.append(f"{names}: {reader} takes 2-D factors only, not those of a convolution")
        if place.kind == "parameter":
            problems.append(f"{names}: {reader} does not read adapters of raw parameters; name per-expert modules")
        if place.heads:
            problems.append(f"{', '.join(place.heads)}: {reader} takes no adapter for a head tied to the embedding")
    if target == "gguf" and conv1d:
        problems.append(
            "fan_in_fan_out: llama.cpp transposes the factors of GPT-2's Conv1D layers along with their weights, "
            "although PEFT stores them untransposed"
        )
    if problems:
        raise ValueError(f"this adapter cannot be exported for {target!r}:\n" + "\n".join(f"  {p}" for p in problems))


def _refuse_variants(places: Sequence[Placement]) -> None:
    """Raises a `ValueError` for what is trained beside the factors where PEFT has no place for it."""
    problems = []
    for place in places:
        what = "".join(_VARIANTS[name] for name in place.site.vectors)
        if what and place.kind == "parameter":
            problems.append(f"{place.names[0]}: PEFT has no {what} for raw parameters; name per-expert modules")
        if place.site.dora and place.groups > 1:
            problems.append(f"{place.names[0]}: PEFT's {what} knows no convolution in {place.groups} groups")
        if what and place.heads:
            problems.append(f"{place.names[0]}: with {what} PEFT's head, {place.heads[0]}, differs from the table")
    if problems:
        raise ValueError("this adapter cannot be saved for PEFT:\n" + "\n".join(f"  {p}" for p in problems))


def bake(modules: Sequence[Module]) -> list[Module]:
    """Modules of one rank, padded with zeros, and of scale one: B holds s·B, rounded once to its dtype."""
    rank = max((m.factors.rank for m in modules), default=1)
    out = []
    for m in modules:
        a, b = m.factors.a, m.factors.b
        missing = rank - m.factors.rank
        b = fold(b, m.factors.scale, m.name)
        a, b = np.pad(a, [(0, missing), (0, 0)]), np.pad(b, [(0, 0), (0, missing)])
        out.append(replace(m, factors=Factors(a, b, 1.0), alpha=float(rank), rslora=False))
    return out


def adapter_config(
    modules: Sequence[Module],
    full: Sequence[str],
    config: LoRAConfig | None,
    others: Sequence[str] | None,
    *,
    task_type: str | None,
    base_model_name_or_path: str | None,
    fan_in_fan_out: bool,
    bias: str = "none",
    tokens: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """The `adapter_config.json` that makes PEFT compute what these modules do.

    **Arguments:** `full`, module names of what is trained in full; `others`, the model's modules that are not
    adapted, which no target may match; None if they are not known, and targets are full names.
    """
    ranks = {m.name: m.factors.rank for m in modules}
    mixed = len({m.rslora for m in modules}) > 1
    rslora = bool(modules) and modules[0].rslora and not mixed
    alphas = {m.name: m.factors.scale * m.factors.rank if mixed else m.alpha for m in modules}
    rank = _usual(ranks.values(), config.rank if config else None, 8)
    alpha = _usual(alphas.values(), config.alpha if config else None, 16)
    plain = [m.name for m in modules if m.kind != "parameter"]
    parameters = [m.name for m in modules if m.kind == "parameter"]
    if problem := _misread(list(tokens or ()), list(tokens or ()), [*plain, *full, *(others or ())]):
        raise ValueError(f"PEFT compares the ends of names: {problem.replace('modules_to_save', 'trained rows')}.")
    targets = sorted(plain) if others is None else shortest_names(plain, [*others, *full])
    groups = {m.group for m in modules} or {1}
    if len(groups) > 1:
        raise ValueError(f"QALoRA's groups are of sizes {sorted(groups)}: PEFT has one for an adapter.")
    stated = LoRAConfig(
        rank=int(rank),
        alpha=alpha,
        target_modules=targets or parameters or full,
        rank_pattern=_deviating(ranks, rank),
        alpha_pattern=_deviating({n: plain_number(a) for n, a in alphas.items()}, alpha),
        modules_to_save=_saved(full, config, [*plain, *(others or ())]),
        use_rslora=rslora,
        use_qalora=max(groups) > 1,
        qalora_group_size=max(groups),
        use_dora=_on_all(modules, MAGNITUDE),
        lora_bias=_on_all(modules, LORA_BIAS),
        bias=bias,
        trainable_token_indices=tokens,
        layer_replication=config.layer_replication if config else None,
        dropout=config.dropout if config and not parameters else 0.0,  # PEFT refuses dropout on parameters
    )
    out = to_peft(
        stated,
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        # PEFT takes no raw parameters beside it, and finds Conv1D layers by itself.
        fan_in_fan_out=fan_in_fan_out and not parameters,
        trained=True,
    )
    out["target_modules"] = targets
    if parameters:
        out["target_parameters"] = sorted(parameters)
    return out


def _on_all(modules: Sequence[Module], vector: str) -> bool:
    """Whether the modules have this vector. **Raises:** `ValueError` if only some do: PEFT has one setting for all."""
    having = [m.name for m in modules if vector in m.factors.vectors]
    if having and len(having) < len(modules):
        without = next(m.name for m in modules if vector not in m.factors.vectors)
        raise ValueError(
            f"{_VARIANTS[vector]} is on for {having[0]} and not for {without}: PEFT has one setting for an adapter."
        )
    return bool(having)


def shortest_names(names: Sequence[str], others: Sequence[str]) -> list[str] | str:
    """The shortest ends of `names` that no other module has, as PEFT matches them: `q_proj`, not 64 full names.

    Containers of modules count as others, and a bare index such as `0` is no end. Where a whole name is the end of
    another module's (`q` and `inner.q`) no list can tell them apart: one regular expression then.
    """
    containers = {prefix for name in (*names, *others) for prefix in _prefixes(name)[:-1]}
    taken = {end for other in {*others, *containers} - set(names) for end in (*_ends(other), other)}
    if taken & set(names):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted({next((end for end in _ends(name) if end not in taken), name) for name in names})


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1) if not parts[-n].isdigit()]


def _usual(values: Any, preferred: float | None, default: float) -> float:
    found = Counter(values)
    if not found:
        return default if preferred is None else preferred
    return preferred if preferred is not None and preferred in found else found.most_common(1)[0][0]


def _deviating(values: Mapping[str, Any], usual: float) -> dict[str, Any]:
    """One pattern for each module that deviates, which no other module of another value can match.

    PEFT tries patterns in the order of the file, which is sorted by key: patterns that overlap are a trap.
    """
    out = {}
    for name, value in values.items():
        if value != usual:
            clash = any(v != value and re.match(rf"(.*\.)?({name})$", n) for n, v in values.items())
            out[f"^{re.escape(name)}" if clash else name] = value
    return out


def _saved(full: Sequence[str], config: LoRAConfig | None, others: Sequence[str]) -> list[str]:
    """Entries of `modules_to_save`: the configuration's where they name exactly `full`, else the full names.

    PEFT compares without a dot boundary, `head` also names `nohead`, and copies a module inside a copied one twice.
    """
    outer = [name for name in full if not any(name.startswith(f"{other}.") for other in full)]
    entries = tuple(config.modules_to_save) if config else ()
    if full and entries and all(saved_by((*name.split("."), "weight"), entries) for name in full):
        if not _misread(entries, full, others):
            return sorted(entries)
    if problem := _misread(outer, full, others):
        raise ValueError(f"PEFT compares the ends of names: {problem}. Rename one, or leave it out.")
    return sorted(outer)


def _misread(entries: Sequence[str], full: Sequence[str], others: Sequence[str]) -> str:
    """What else PEFT would take `entries` of `modules_to_save` to name, if anything."""
    hit = {end for name in (*full, *others) for end in _prefixes(name) if end.endswith(tuple(entries))}
    for name in sorted(hit):
        if strangers := [other for other in others if name in _prefixes(other)]:
            return f"`modules_to_save={list(entries)}` also names `{strangers[0]}`"
        if nested := hit & set(_prefixes(name)[:-1]):
            return f"`modules_to_save={list(entries)}` names `{min(nested)}` and `{name}` in it"
    return ""


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
