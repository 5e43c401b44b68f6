"""What a merge will write, decided and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_jax.cli._adapter import Adapter
from lora_jax.cli._edits import Edit, changes_of, make_edit, renaming, unadapted
from lora_jax.cli._show import listed
from lora_jax.cli._tied import find_tie, is_head, settle, touches_vocabulary
from lora_jax.peft_config import refused_fields, without_init
from lora_torch.hf_checkpoint import Checkpoint
from lora_torch.peft_settings import unknown_settings


@dataclass(frozen=True, eq=False)
class Plan:
    edits: dict[str, Edit]  # by the name of the tensor to write
    sources: dict[str, str]  # {tensor to write: base tensor it comes from}
    config: dict[str, Any]  # config.json to write


def plan_merge(adapter: Adapter, base: Checkpoint, untie: bool = False, partial: bool = False) -> Plan:
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
    try:
        config = without_init(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    problems = refused_fields(config)
    if config.get("layer_replication"):
        problems.append("`layer_replication` shares one weight between layers whose adapters differ")
    problems += unknown_settings(config)
    if problems:
        raise ValueError(f"{where} cannot be merged: {listed(problems)}.")
    if not (adapter.modules or adapter.replaced or adapter.rows):
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
