"""Tied embedding and head: one table in the file, two modules in the model.

An adapter changes the modules separately. Added to the one table, a change to the embedding would also change
the head, and the merged model would not be the adapted one. So either both sides get the same change, or the
tables are stored apart, or the merge is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_jax import products
from lora_jax.cli._adapter import LowRank
from lora_jax.cli._edits import Change
from lora_torch.hf_checkpoint import Checkpoint

HEADS = ("lm_head", "embed_out", "decoder")
# Parts of architecture names that have a head over the vocabulary; other classes tie nothing.
LANGUAGE_MODELS = ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration", "PreTraining", "DoubleHeads")


@dataclass(frozen=True)
class Tie:
    """The table of a base that serves both sides, and the head's own tensor if the file stores it too."""

    table: str
    stored_head: str | None


@dataclass(frozen=True, eq=False)
class Settled:
    """The changes with the tie resolved. If `untied`, `head` is to be stored apart from `tie.table`."""

    changes: dict[str, Change]
    untied: bool = False
    head: str | None = None


def is_head(name: str) -> bool:
    """Whether a tensor name is that of an output head's weight."""
    pieces = name.split(".")
    return pieces[-1] == "weight" and len(pieces) > 1 and pieces[-2] in HEADS


def touches_vocabulary(name: str, change: Change, base: Checkpoint) -> bool:
    """Whether a change may be one to the embedding or the head of a language model."""
    full, factors = change.full, change.factors
    if change.rows is not None:
        return True
    embedding = factors is not None and factors.kind == "embedding"
    words = vocabulary_size(base)
    if words is None:
        return is_head(name) or embedding
    rows = {full.shape[0]} if full is not None and full.ndim == 2 else set()
    if factors is not None:
        rows.add(factors.a.shape[1] if embedding else factors.b.shape[0])
    return is_head(name) or words in rows


def vocabulary_size(base: Checkpoint) -> int | None:
    return base.config.get("vocab_size", _text_config(base).get("vocab_size"))


def _text_config(base: Checkpoint) -> Mapping:
    inner = base.config.get("text_config")  # of models that see images, too
    return inner if isinstance(inner, dict) else {}


def find_tie(base: Checkpoint) -> Tie | None:
    """The tied vocabulary table of a base, or None if the head is a tensor of its own or there is no head.

    `tie_word_embeddings` decides where config.json has it. transformers leaves it out where it equals the
    class's default, which only the class knows: there a head that is missing, or equal to the table, is tied.

    **Raises:** `ValueError` if the head is tied but it cannot be told to what.
    """
    tied = base.config.get("tie_word_embeddings", _text_config(base).get("tie_word_embeddings"))
    architectures = base.config.get("architectures") or []
    has_head = not architectures or any(mark in name for name in architectures for mark in LANGUAGE_MODELS)
    if tied is False or not has_head:
        return None
    words = vocabulary_size(base)
    shaped = [
        name
        for name, entry in base.entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and entry.shape[0] == words
    ]
    heads = [name for name in shaped if is_head(name)]
    tables = [name for name in shaped if not is_head(name)]
    if len(tables) != 1 or len(heads) > 1:
        raise ValueError(
            f"{base.directory} may tie its head to its embedding, and the adapter changes one of them, but the "
            f"table cannot be told: vocab_size is {words}, and that many rows have {', '.join(shaped) or 'none'}. "
            "If they are separate, let config.json say tie_word_embeddings=false."
        )
    head = heads[0] if heads else None
    if tied is None and head is not None and not np.array_equal(base.tensor(head), base.tensor(tables[0])):
        return None
    return Tie(tables[0], head)


def settle(tie: Tie, base: Checkpoint, changes: Mapping[str, Change], untie: bool) -> Settled:
    """Makes one table of equal changes to both sides, or plans two.

    **Raises:** `ValueError` if the sides differ and `untie` is not asked for, or the head has no known name.
    """
    out = dict(changes)
    named = next((name for name in out if is_head(name)), None)
    on_table, on_head = out.get(tie.table), out.get(named) if named else None
    if on_table is None and on_head is None:
        return Settled(out)
    if on_table is not None and on_table.rows is not None:
        if on_head is not None:
            raise ValueError(
                f"the base ties its output head to {tie.table}, of which the adapter trains rows, and it changes "
                "the head as well: two values for one row."
            )
        # PEFT gives a tied head the trained rows too.
        return Settled(out if tie.stored_head is None else {**out, tie.stored_head: on_table})
    if _agree(on_table, on_head, base, tie):
        if named not in base.entries:
            del out[str(named)]
        return Settled(out)
    if not untie:
        sides = "only the embedding" if on_head is None else "only the head" if on_table is None else "each side"
        raise ValueError(
            f"the base ties its output head to {tie.table}, and the adapter changes {sides}"
            f"{' differently' if sides == 'each side' else ''}: one table cannot hold the result. Pass --untie to "
            "store the two apart (config.json will say tie_word_embeddings=false)."
        )
    return Settled(out, True, named or tie.stored_head or _head_name(tie, base))


def _head_name(tie: Tie, base: Checkpoint) -> str:
    architectures = base.config.get("architectures") or []
    if any("CausalLM" in name or "LMHead" in name for name in architectures):
        return "lm_head.weight"
    raise ValueError(
        f"--untie: the head tied to {tie.table} has an unknown name in {architectures}, so it cannot be stored "
        "apart. Untie the base with transformers first."
    )


def _agree(table: Change | None, head: Change | None, base: Checkpoint, tie: Tie) -> bool:
    """Whether both sides end up equal, to float32 rounding."""
    if table is None or head is None:
        return False
    if table.full is not None or head.full is not None:
        one, two = (base.tensor(tie.table) if c.full is None else c.full for c in (table, head))
        if not np.array_equal(one.astype(np.float32), two.astype(np.float32)):
            return False
    return _same_update(table.factors, head.factors)


def _same_update(embedding: LowRank | None, head: LowRank | None) -> bool:
    """Whether s B A of the embedding, (features, words), is the transpose of the head's, (words, features)."""
    if embedding is None or head is None:
        return embedding is head
    if embedding.magnitude is not None or head.magnitude is not None:
        return False  # DoRA's norms are of the embedding's columns, and of the head's rows
    (b1, a1), (b2, a2) = embedding.matrices(), head.matrices()
    if b1.shape[0] != a2.shape[1] or a1.shape[1] != b2.shape[0]:
        return False
    size = max(embedding.norm(), head.norm())
    return products.distance(embedding.scaling * b1, a1, head.scaling * a2.T, b2.T) <= 1e-6 * size
