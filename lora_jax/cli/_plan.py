"""What a merge will write, decided and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_jax.cli._adapter import Adapter, listed
from lora_jax.cli._base import Base
from lora_jax.cli._edits import Edit, changes_of, make_edit, renaming, unadapted
from lora_jax.cli._tied import find_tie, is_head, settle, touches_vocabulary

# Initialisations after which the factors refer to the base as it was given. The others (pissa, olora, corda,
# loftq, lora_ga) subtract from the base first, so that adding the factors to the original would be wrong.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Settings that leave the meaning of s * B * A alone, or that are handled here.
HANDLED = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform
    loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_core modules_to_save peft_type
    peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type
    use_rslora""".split()
)


@dataclass(frozen=True, eq=False)
class Plan:
    edits: dict[str, Edit]  # by the name of the tensor to write
    sources: dict[str, str]  # {tensor to write: base tensor it comes from}
    config: dict[str, Any]  # config.json to write


def plan_merge(adapter: Adapter, base: Base, untie: bool = False, partial: bool = False) -> Plan:
    """Decides every tensor of the result.

    **Raises:** `ValueError` for whatever could not be merged exactly: an unsupported method, a missing or
    misshapen base tensor, a one-sided change to a tied table (unless `untie`), targeted modules without
    factors (unless `partial`).
    """
    _check_supported(adapter)
    changes = changes_of(adapter)
    at_vocabulary = any(touches_vocabulary(name, change, base) for name, change in changes.items())
    tie = find_tie(base) if at_vocabulary else None
    # A tied head is usually not in the file at all: `settle` finds its place.
    stored = [name for name in changes if not (tie and is_head(name) and name not in base.entries)]
    names = renaming(stored, base.entries)
    missing = [] if partial else unadapted(adapter, base, names)
    if missing:
        raise ValueError(
            f"{adapter.directory} targets {len(missing)} modules of the base for which its file has no factors: "
            f"{listed(missing, 4)}. If that is meant so, pass --partial."
        )
    changes = {names.get(name, name): change for name, change in changes.items()}
    sources, config = {name: name for name in base.entries}, base.config
    if tie is not None:
        settled = settle(tie, base, changes, untie)
        changes = settled.changes
        if settled.untied:
            config = {**config, "tie_word_embeddings": False}
            if settled.head not in sources:
                _check_prefix(names)
                sources = _insert_after(sources, tie.table, str(settled.head))
    edits: dict[str, Edit] = {}
    problems: list[str] = []
    for name, change in changes.items():
        try:
            edits[name] = make_edit(name, base.entries[sources[name]], change, adapter, base)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{adapter.directory} does not fit {base.directory}: {listed(problems)}.")
    return Plan(edits, sources, config)


def _check_supported(adapter: Adapter) -> None:
    config, where = adapter.config, adapter.directory
    if config.get("use_dora"):
        raise ValueError(f"{where} is a DoRA adapter, which is not supported here; merge it with PEFT.")
    if adapter.others:
        name = next(iter(adapter.others))
        raise ValueError(f"{where} holds {name}, which is not supported here; merge it with PEFT.")
    init = config.get("init_lora_weights")
    if init not in PLAIN_INITS:
        raise ValueError(
            f"{where} has init_lora_weights={init!r}, whose factors refer to a base from which the initial ones "
            "were subtracted. Convert it first: PEFT's `save_pretrained` with "
            "`path_initial_model_for_weight_conversion`."
        )
    others = [key for key, value in config.items() if key not in HANDLED and value]
    if others:
        told = ", ".join(f"{key}={config[key]!r}" for key in others)
        raise ValueError(f"{where} uses {told}, which is not supported here; merge it with PEFT.")
    if not (adapter.modules or adapter.replaced):
        raise ValueError(f"{where} changes nothing.")


def _check_prefix(names: dict[str, str]) -> None:
    if any(ours != theirs for ours, theirs in names.items()):
        raise ValueError(
            "--untie: the base's tensor names lack the model's prefix, so that a head cannot be stored beside "
            "them. Save the base with its head first, by `save_pretrained`."
        )


def _insert_after(sources: dict[str, str], table: str, head: str) -> dict[str, str]:
    """The head goes right behind its table, hence into the same shard."""
    out: dict[str, str] = {}
    for name in sources:
        out[name] = name
        if name == table:
            out[head] = table
    return out
