"""How each kind of torch model spells the tensors of one adapted module, and translation between them.

    plain      M.weight                                   no adapter
    lora       M.weight  M.lora_A.weight  M.lora_B.weight  M.lora_magnitude                     `lora_torch.lora`
    torchtune  M.weight  M.lora_a.weight  M.lora_b.weight  M.magnitude                          `lora_torch.torchtune`
    peft       P.M.base_layer.weight  P.M.lora_A.default.weight  P.M.lora_B.default.weight
               P.M.lora_magnitude_vector.default.weight   with P = base_model.model             a `PeftModel`
    peft-file  P.M.lora_A.weight  P.M.lora_B.weight  P.M.lora_magnitude_vector                  its saved adapter

The module M has the same name in all of them, and the shapes agree: A (rank, in), B (out, rank), magnitude (out,). So a
translation moves no values, except the q and k rows of a `TuneDecoder`. What none of them stores is the scale:
`live_models.check_scales` compares it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .torchtune_names import TuneDecoder

# The parts of an adapter; any other part of a key is a tensor of the base, under its own name.
A, B, MAGNITUDE = "a", "b", "magnitude"
PARTS = (A, B, MAGNITUDE)
# Left over in a base tensor's name, these tell of an adapter that was not understood.
_MARKS = ("lora_", "modules_to_save.", "original_module.", "base_layer.")


@dataclass(frozen=True)
class Dialect:
    """One line of the table above.

    **Fields:** `a`, `b`, `magnitude`, what follows the module's name, with `{adapter}` for the name of the adapter;
    `prefix` before every name; `base`, what stands between an adapted module and its own tensors; `stores_base`.
    """

    name: str
    a: str = ""
    b: str = ""
    magnitude: str = ""
    prefix: str = ""
    base: str = ""
    stores_base: bool = True

    def ending(self, part: str, adapter: str) -> str:
        return getattr(self, part).replace("{adapter}", adapter)


PEFT_PREFIX = "base_model.model."
DIALECTS = {
    each.name: each
    for each in (
        Dialect("plain"),
        Dialect("lora", "lora_A.weight", "lora_B.weight", "lora_magnitude"),
        Dialect("torchtune", "lora_a.weight", "lora_b.weight", "magnitude"),
        Dialect(
            "peft",
            "lora_A.{adapter}.weight",
            "lora_B.{adapter}.weight",
            "lora_magnitude_vector.{adapter}.weight",
            PEFT_PREFIX,
            "base_layer.",
        ),
        Dialect(
            "peft-file",
            "lora_A.weight",
            "lora_B.weight",
            "lora_magnitude_vector",
            PEFT_PREFIX,
            stores_base=False,
        ),
    )
}
DialectName = Literal["plain", "lora", "torchtune", "peft", "peft-file"]


@dataclass(frozen=True)
class Tensors:
    """A state dict taken apart: `{(module, part): value}`, and the modules that are adapted."""

    values: dict[tuple[str, str], Any]
    adapted: frozenset[str]

    def adapters(self) -> dict[str, dict[str, Any]]:
        """`{module: {"a": …, "b": …, "magnitude": …}}` of what is adapted."""
        out: dict[str, dict[str, Any]] = {}
        for (module, part), value in self.values.items():
            if part in PARTS:
                out.setdefault(module, {})[part] = value
        return out


def translate(
    state_dict: Mapping[str, Any],
    source: DialectName,
    target: DialectName,
    *,
    keep: Literal["all", "base", "adapter"] = "all",
    adapted: Collection[str] = (),
    adapter_name: str = "default",
    decoder: TuneDecoder | None = None,
) -> dict[str, Any]:
    """The same tensors under another kind of model's names.

    **Arguments:**

    - `state_dict`: names to arrays of any kind; whole, or only a base, or only an adapter. It is not changed.
    - `source`, `target`: see the table of this module.
    - `keep`: `"base"` or `"adapter"` leaves the other out.
    - `adapted`: modules that are adapted although `state_dict` holds no factors of them; a PEFT model has another name
        for their base.
    - `adapter_name`: of the adapter in a PEFT model. Its other adapters are left out.
    - `decoder`: between torchtune's own decoders and transformers' models, whose modules and rows of q and k differ.
        The source or the target, and not both, must then be `"torchtune"`.

    **Returns:** a new dict. Values are the same objects, but for the rows that `decoder` moves.

    **Raises:** `ValueError` naming every key that cannot be read or written, each with what to do.
    """
    check_dialect(source, "source")
    check_dialect(target, "target")
    if keep not in ("all", "base", "adapter"):
        raise ValueError(f"`keep={keep!r}` is none of 'all', 'base', 'adapter'")
    if decoder is not None and (source == "torchtune") == (target == "torchtune"):
        raise ValueError(
            f"`decoder` is for the way from or to torchtune, not from {source!r} to {target!r}; leave it out"
        )
    tensors = take_apart(state_dict, source, adapter_name)
    check_bias(tensors, source, target)
    kept = {key: x for key, x in tensors.values.items() if keep == "all" or (key[1] in PARTS) == (keep == "adapter")}
    marked = tensors.adapted | frozenset(adapted)
    if decoder is not None:
        move = decoder.to_hf if source == "torchtune" else decoder.to_tune
        moved = [move(module, part, value) for (module, part), value in kept.items()]
        kept = {(module, part): value for module, part, value in moved}
        # Only the name is asked for: an empty module has no rows to move.
        marked = frozenset(move(module, A, None)[0] for module in marked)
    return put_together(Tensors(kept, marked), target, adapter_name)


def check_dialect(name: str, argument: str = "dialect") -> None:
    """**Raises** `ValueError` unless the table of this module has `name`."""
    if name not in DIALECTS:
        raise ValueError(f"`{argument}={name!r}` is none of {sorted(DIALECTS)}")


def take_apart(state_dict: Mapping[str, Any], source: DialectName, adapter_name: str = "default") -> Tensors:
    """**Raises** `ValueError` for keys that are no tensor of the base and no factor."""
    dialect = DIALECTS[source]
    values: dict[tuple[str, str], Any] = {}
    adapted: set[str] = set()
    problems = []
    for key, value in state_dict.items():
        if not key.startswith(dialect.prefix):
            problems.append(f"{key} does not start with `{dialect.prefix}`")
            continue
        name = key.removeprefix(dialect.prefix)
        found = _factor(name, dialect, adapter_name) or _base(name, dialect)
        if found is None:
            if not _is_other_adapter(name, dialect):
                problems.append(f"{key} {_why(name, source)}")
            continue
        module, part, is_adapted = found
        values[module, part] = value
        if is_adapted:
            adapted.add(module)
    if problems:
        raise ValueError(f"this is no state dict of {source!r}:\n" + "\n".join(f"  {text}" for text in problems))
    return Tensors(values, frozenset(adapted))


def put_together(tensors: Tensors, target: DialectName, adapter_name: str = "default") -> dict[str, Any]:
    """**Raises** `ValueError` for tensors that the target has no name for."""
    dialect = DIALECTS[target]
    out: dict[str, Any] = {}
    problems = []
    for (module, part), value in tensors.values.items():
        dot = "." if module else ""
        if part in PARTS:
            if not dialect.a:
                problems.append(f"{module or '(root)'}: {target!r} has no adapters; merge them, or pass keep='base'")
                continue
            end = dialect.ending(part, adapter_name)
        elif not dialect.stores_base:
            problems.append(f"{module}{dot}{part}: {target!r} holds adapters only; pass keep='adapter'")
            continue
        else:
            end = (dialect.base if module in tensors.adapted else "") + part
        out[f"{dialect.prefix}{module}{dot}{end}"] = value
    if problems:
        shown = "\n".join(f"  {text}" for text in dict.fromkeys(problems))
        raise ValueError(f"these tensors cannot be written as {target!r}:\n{shown}")
    return out


def _factor(name: str, dialect: Dialect, adapter: str) -> tuple[str, str, bool] | None:
    for part in PARTS:
        end = dialect.ending(part, adapter)
        if end and (name == end or name.endswith(f".{end}")):
            return name.removesuffix(end).removesuffix("."), part, True
    return None


def _base(name: str, dialect: Dialect) -> tuple[str, str, bool] | None:
    module, _, tensor = name.rpartition(".")
    infix = dialect.base.removesuffix(".")
    is_adapted = bool(infix) and (module == infix or module.endswith(f".{infix}"))
    if is_adapted:
        module = module.removesuffix(infix).removesuffix(".")
    bare = f"{module}.{tensor}" if module else tensor
    if not dialect.stores_base or any(bare.startswith(mark) or f".{mark}" in bare for mark in _MARKS):
        return None
    return module, tensor, is_adapted


def _is_other_adapter(name: str, dialect: Dialect) -> bool:
    """Whether a key of a PEFT model belongs to an adapter of another name."""
    _, _, end = name.rpartition(".lora_")
    return "{adapter}" in dialect.a and len(parts := end.split(".")) == 3 and parts[0] in "A B magnitude_vector".split()


def _why(name: str, source: str) -> str:
    if "modules_to_save." in name or "original_module." in name:
        return "is trained in full: save the model (`save_pretrained`), and read it by `lora_torch.load_peft`"
    if "lora_embedding_" in name or "base_layer" in name:
        return "adapts no linear layer: save the model (`save_pretrained`), and read it by `lora_torch.load_peft`"
    others = [other for other, each in DIALECTS.items() if _factor(name, each, "default") and other != source]
    return f"has a name of {others[0]!r}; pass that as the source" if others else "is no factor that is known here"


def check_bias(tensors: Tensors, source: str, target: str) -> None:
    """**Raises** `ValueError` for layers that compute something else there.

    torchtune's DoRA scales the bias, the others' does not.
    """
    if (source == "torchtune") == (target == "torchtune") or target == "plain":
        return
    biased = [m for m, part in tensors.values if part == MAGNITUDE and (m, "bias") in tensors.values]
    if biased:
        raise ValueError(
            f"{', '.join(biased[:3])}: a DoRA layer of torchtune multiplies its bias by the magnitude, one of "
            f"{target if source == 'torchtune' else source!r} does not: merge it where it is"
        )
