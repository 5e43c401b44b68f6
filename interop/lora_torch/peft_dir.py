"""Hugging Face PEFT directories, both ways: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

    save_peft(adapter, "out", plan, base_model_name_or_path="gpt2", names="hf-flax")
    plan = plan_peft("out", fn, params, tokens, names="hf-flax")
    adapter = load_peft("out", plan, names="hf-flax")

Torch is not needed. What the factors look like is in `peft_tensors`, what they are called in `peft_names`, what each
reader takes in `peft_export`, and how files are judged in `peft_read`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from lora_jax.adapters import Adapter
from lora_jax.config import LoRAConfig
from lora_jax.planning import Plan
from lora_jax.sites import LORA_A, LORA_B, MAGNITUDE, Site

from .arrays import convert
from .files import FLOATS
from .model_card import model_card as make_card
from .peft_export import Module, adapter_config, bake, module_of, refuse
from .peft_full import check_whole, full_tensors, lone_biases
from .peft_keys import PARAMETER_ORDER, PREFIX, keys_of, vector_keys
from .peft_names import Names, as_naming, fan_in_fan_out, places, torch_path, with_stacks
from .peft_read import TENSOR_FILE
from .peft_settings import CONFIG_FILE
from .peft_tensors import Placement, to_modules
from .peft_tensors import tied as tied_factors
from .peft_tokens import token_tensors

CARD_FILE = "README.md"


def save_peft(
    adapter: Adapter,
    directory: str | Path,
    plan_or_config: Plan | LoRAConfig | None = None,
    *,
    target: Literal["peft", "vllm", "gguf"] = "peft",
    names: Names = None,
    tied: Mapping[str, str] | None = None,
    base_model_name_or_path: str | os.PathLike[str] | None = None,
    task_type: str | None = None,
    model_card: str | bool = True,
    parameter_order: Sequence[str] = PARAMETER_ORDER,
    overwrite: bool = False,
) -> Path:
    """Writes an adapter as a PEFT directory.

    Factors keep their dtype. Ranks, alphas and rsLoRA are those of the adapter's sites; modules that deviate from
    the usual ones get a pattern of their full name each. A stack of layers becomes one module per layer.

    **Arguments:**

    - `plan_or_config`: with a plan, `target_modules` are the shortest names that no other module of the model
        has, else full names. Either gives the dropout and `modules_to_save`.
    - `target`: who will read it. `"vllm"` and `"gguf"` fold the scale into B and pad all ranks to the largest.
    - `names`: a `Naming`, the name of a preset (`"hf-flax"`, `"nnx"`, `"tunix"`, …) or a table of renames.
    - `tied`: `{head's tensor: table's tensor}` where the adapted embedding is the output head as well; the head
        gets the same adapter, transposed, or the same copy if the table is trained in full.
    - `task_type`: PEFT's, e.g. `"CAUSAL_LM"`, `"SEQ_CLS"`.
    - `model_card`: True writes one, a string is written as it is, False writes none.
    - `parameter_order`: order in which a torch module registers parameters that are adapted as `target_parameters`.
    - `overwrite`: replace an adapter that is there. Other files in the directory stay.

    **Returns:** the directory.

    **Raises:** `FileExistsError` if the directory is there and not empty; `ValueError` for sites that have no
    name or no form in PEFT, or that `target` cannot read, all in one message. Nothing is written then.
    """
    directory = Path(directory)
    if not isinstance(adapter, Adapter):
        raise TypeError(f"`adapter` must be an Adapter, got {type(adapter).__name__}: it knows ranks and roles.")
    if not overwrite and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is there and not empty; pass `overwrite=True` to replace its adapter.")
    plan = plan_or_config if isinstance(plan_or_config, Plan) else None
    config = plan_or_config.config if isinstance(plan_or_config, Plan) else plan_or_config
    naming = as_naming(names)
    placed = places(adapter.sites, naming, tied, plan and [row.path for row in plan.rows])
    full = full_tensors(adapter, naming, tied)
    biases = lone_biases(full)
    full_modules = list(dict.fromkeys(name.rpartition(".")[0] for name in full if name not in biases))
    conv1d = fan_in_fan_out(adapter.sites, naming)
    others = None if plan is None else _others(plan, adapter.sites, naming)
    rows, indices = token_tensors(adapter, naming)
    refuse(target, placed, [*full_modules, *biases, *indices], conv1d, bool(config and config.layer_replication))
    own = [name for place in placed if place.kind != "parameter" for name in (*place.names, *place.heads)]
    check_whole(full_modules, [*own, *(others or ())])
    modules = _modules(adapter, placed)
    _check_dtypes([*(x for m in modules for x in m.factors.arrays), *full.values(), *rows.values()])
    if target != "peft":
        modules = bake(modules)
    inside = {f"{m.name}.bias" for m in modules}  # of layers that PEFT wraps
    data = adapter_config(
        modules,
        full_modules,
        config,
        others,
        task_type=task_type,
        base_model_name_or_path=None if base_model_name_or_path is None else os.fspath(base_model_name_or_path),
        fan_in_fan_out=conv1d,
        tokens=indices,
        bias="none" if not biases else "lora_only" if inside.issuperset(biases) else "all",
    )
    keys = keys_of(placed, parameter_order)
    layered = {name: name.removesuffix("bias") + "base_layer.bias" for name in inside}
    tensors = {PREFIX + layered.get(name, name): value for name, value in full.items()} | rows
    for module in modules:
        key_a, key_b = keys[module.name]
        tensors[key_a], tensors[key_b] = module.factors.a, module.factors.b
        for vector, value in module.factors.vectors.items():
            if module.kind == "conv" and vector == MAGNITUDE:
                value = value.reshape(1, -1, *(1 for _ in module.factors.b.shape[2:]))
            tensors |= dict.fromkeys(vector_keys(key_a, vector), value)
    _check_finite(tensors)
    card = model_card
    if card is True:
        count = sum(int(np.prod(value.shape)) for value in tensors.values())
        card = make_card(data, target=target, modules=len(modules), parameters=count)
    return _write(directory, data, tensors, card or None)


def target_names(sites: Plan | Sequence[Site], names: Names = None) -> dict[str, tuple[str, ...]]:
    """The torch modules of each adapted parameter, by the parameter's dotted name.

    >>> target_names(plan)  # doctest: +SKIP
    {'layers.attn.q.kernel': ('layers.0.attn.q', 'layers.1.attn.q')}
    """
    sites = sites.sites if isinstance(sites, Plan) else tuple(sites)
    return {place.site.name: place.names for place in places(sites, as_naming(names))}


def _modules(adapter: Adapter, placed: Sequence[Placement]) -> list[Module]:
    out = []
    for place in placed:
        a, b = (convert(adapter.leaf(place.site.leaf_path(factor)), "numpy") for factor in (LORA_A, LORA_B))
        vectors = {name: convert(x, "numpy") for name, x in adapter.vectors(place.site).items()}
        for name, factors in to_modules(place, a, b, vectors).items():
            out.append(module_of(place, name, factors))
            out += [module_of(place, head, tied_factors(factors)) for head in place.heads]
    return out


def _check_dtypes(arrays: Sequence[np.ndarray]) -> None:
    kinds = {array.dtype for array in arrays}
    if wrong := sorted(dtype.name for dtype in kinds - set(map(np.dtype, FLOATS.values()))):
        raise ValueError(
            f"PEFT reads {', '.join(np.dtype(dtype).name for dtype in FLOATS.values())}, not {', '.join(wrong)}; cast "
            "first, `jax.tree.map(lambda x: x.astype('float32'), adapter)`"
        )


def _check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """A run that diverged must not be handed over as a success: every reader would load it without a word."""
    if wrong := [name for name, value in tensors.items() if not np.isfinite(value.astype(np.float32)).all()]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{len(wrong)} of {len(tensors)} tensors hold NaN or infinite numbers: {', '.join(wrong[:3])}{more}. The "
            "training diverged; export an earlier checkpoint."
        )


def _others(plan: Plan, sites: Sequence[Site], naming: Any) -> list[str]:
    """Torch modules of the parameters that are not adapted. Stacked ones stand once, with `{i}` for the index."""
    adapted = {site.path for site in sites}
    naming = with_stacks(sites, naming)
    rows = [row for row in plan.rows if row.path not in adapted]
    own = {torch_path(site)[:-1] for site in sites if not site.is_full}
    out = []
    for row in rows:
        path = row.path[1:] if row.path[0] == "params" else row.path
        if path[:-1] not in own:  # the bias of an adapted layer
            out += [name.rpartition(".")[0] for name in naming.target(path, len(row.shape)).names]
    return [name for name in dict.fromkeys(out) if name]


def _write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], card: str | None) -> Path:
    """Everything goes to a folder of its own first. A new directory appears whole. In one that is there the
    configuration goes first and comes last, so that it is never an adapter of two halves, and a failure puts back what
    was there."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; name a directory.")
    final = directory.resolve()  # a link stays one
    # Inside a directory that is there: its parent may be another file system, or not ours to write.
    work = (final if final.is_dir() else final.parent) / f".{final.name}.{uuid.uuid4().hex}"
    work.mkdir(parents=True)
    try:
        # save_file writes the raw memory of an array that is not contiguous.
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, work / TENSOR_FILE, {"format": "pt"})
        if card is not None:
            (work / CARD_FILE).write_text(card, encoding="utf-8")
        (work / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if final.is_dir():
            _exchange(work, final)
        else:
            os.replace(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def _exchange(work: Path, directory: Path) -> None:
    """Moves the files of `work` to `directory`; those they replace are kept in `work` until all are there."""
    new = [name for name in (TENSOR_FILE, CARD_FILE, CONFIG_FILE) if (work / name).exists()]
    old = [name for name in reversed(new) if (directory / name).exists()]
    (work / "old").mkdir()
    try:
        for name in old:
            os.replace(directory / name, work / "old" / name)
        for name in new:
            os.replace(work / name, directory / name)
    except BaseException:
        for name in new:
            if (work / "old" / name).exists():
                os.replace(work / "old" / name, directory / name)
            elif name not in old:
                (directory / name).unlink(missing_ok=True)
        raise
