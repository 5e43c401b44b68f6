"""`LoRAConfig` to and from the dictionary of a PEFT `adapter_config.json`.

A field of PEFT's that changes what an adapter computes and has no counterpart here is refused by name; it is
never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.config import LoRAConfig
from lora_jax.targets import is_wildcard

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Modules that PEFT adds to `modules_to_save` by itself, for a model of this task.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_INITS = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "random": False}
# Initialisations that leave the base as it was, by which trained factors can be told from ones that need another base.
_PLAIN_INITS = ("True", "False", "None", "gaussian", "eva", "orthogonal", "mica")
# Settings of initialisations, which trained factors no longer depend on.
_INIT_SETTINGS = ("init_lora_weights", "corda_config", "eva_config", "loftq_config", "lora_ga_config")
_INITS_BACK = {str(peft): ours for ours, peft in _INITS.items()}

# Read: they have a field here.
_MAPPED = frozenset(
    "peft_type r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern modules_to_save use_rslora use_dora lora_bias bias trainable_token_indices lora_dropout use_qalora "
    "qalora_group_size layer_replication init_lora_weights target_parameters task_type".split()
)
# Without effect on what is computed: bookkeeping, storage order (the file's factors have one orientation in any
# case), sizes that matter only beside a switch in `_REFUSED`, and tying, which a tied table does here by itself.
_IGNORED = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying fan_in_fan_out inference_mode megatron_core "
    "peft_version revision runtime_config".split()
)
# Every one of these is off when it is falsy, in all of PEFT's releases.
_REFUSED = frozenset(
    "alora_invocation_tokens arrow_config corda_config eva_config kasa_config loftq_config "
    "lora_ga_config megatron_config monteclora_config use_bdlora "
    "velora_config".split()
)
# PEFT cannot merge these, or merges them wrongly.
_NEVER_MERGED = frozenset({"alora_invocation_tokens", "arrow_config"})


def from_peft(data: Mapping[str, Any], *, strict: bool = True) -> LoRAConfig:
    """The `LoRAConfig` that adapts what a PEFT LoRA configuration adapts.

    `target_parameters` join `target_modules`, which name parameters as well here. Names stay as they are: a plan
    matches them against `layers.0` and `layers_0` alike. A missing `r` or `lora_alpha` is 8, as in PEFT. Entries of
    `modules_to_save` name whole parts here; PEFT's `norm` also copies `input_layernorm`: write those out.

    **Arguments:**

    - `data`: the parsed `adapter_config.json`, or `peft.LoraConfig(...).to_dict()`.
    - `strict`: refuse keys that PEFT 0.21 does not have. `False` drops them, as PEFT does with a warning.

    **Raises:** `ValueError` naming every field whose value is not implemented here and every unknown key; and,
    as `LoRAConfig`, for values out of range. `TypeError` if `data` is no mapping.

    **Source:** `LoraConfig` of PEFT 0.21.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"a PEFT configuration is a dictionary, got {type(data).__name__}.")
    check_is_lora(data)
    problems = refused_fields(data)
    if strict and (unknown := unknown_fields(data)):
        problems.append(f"unknown keys {', '.join(f'`{k}`' for k in unknown)} (`strict=False` drops them)")
    init = data.get("init_lora_weights", True)
    if str(init) not in _INITS_BACK:
        problems.append(
            f"`init_lora_weights={init!r}` is not implemented: use one of {', '.join(map(repr, _INITS.values()))}, and "
            "for values from weights or data the functions of `lora_jax.inits`"
        )
    if not (data.get("target_modules") or data.get("target_parameters")):
        problems.append("`target_modules` is missing, and PEFT's choice by model type is not made here: name them")
    heads = TASK_HEADS.get(str(data.get("task_type") or ""), ())
    if heads and data.get("modules_to_save") is None:
        problems.append(
            f"`task_type={data['task_type']!r}` makes PEFT train modules called {' or '.join(heads)} in full: "
            f"add `modules_to_save` with the one your model has, or an empty list"
        )
    if problems:
        raise ValueError("this PEFT configuration cannot be followed: " + "; ".join(problems) + ".")
    layers = data.get("layers_to_transform")
    return LoRAConfig(
        rank=data.get("r", 8),
        alpha=data.get("lora_alpha", 8),
        target_modules=_targets(data),
        exclude_modules=data.get("exclude_modules") or None,
        layers_to_transform=None if layers == [] else layers,  # PEFT's empty list is no filter
        layers_pattern=data.get("layers_pattern") or None,
        rank_pattern=data.get("rank_pattern") or {},
        alpha_pattern=data.get("alpha_pattern") or {},
        modules_to_save=data.get("modules_to_save") or (),
        use_rslora=data.get("use_rslora") or False,
        use_dora=data.get("use_dora") or False,
        lora_bias=data.get("lora_bias") or False,
        use_qalora=data.get("use_qalora") or False,
        qalora_group_size=data.get("qalora_group_size") or 16,
        bias=data.get("bias") or "none",
        trainable_token_indices=data.get("trainable_token_indices") or None,
        layer_replication=data.get("layer_replication") or None,
        dropout=data.get("lora_dropout") or 0.0,
        init=_INITS_BACK[str(init)],
    )


def to_peft(
    config: LoRAConfig,
    *,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
    fan_in_fan_out: bool = False,
    trained: bool = False,
) -> dict[str, Any]:
    """The dictionary of a PEFT LoRA configuration; only what is used is in it.

    `peft.LoraConfig(**config.to_peft())` trains in PEFT what `config` trains here, if the names are the same
    on both sides. Wildcards become one regular expression, which PEFT has instead.

    **Arguments:**

    - `task_type`: one of `TASK_TYPES` or None; PEFT adds the heads of some to `modules_to_save`.
    - `fan_in_fan_out`: the torch layers store (in, out), as GPT-2's `Conv1D`.
    - `trained`: for the file beside trained factors, whose initialisation no longer matters.

    **Raises:** `ValueError` for an unknown task type, for wildcards with `layers_to_transform`, and for an `init`
    that PEFT lacks unless `trained`.
    """
    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(f"`task_type={task_type!r}` is unknown to PEFT; use None or one of {', '.join(TASK_TYPES)}.")
    wild = not isinstance(config.target_modules, str) and any(map(is_wildcard, config.target_modules))
    if wild and config.layers_to_transform:
        raise ValueError(
            "PEFT has no wildcards, and `layers_to_transform` filters names only, not the regular expression that "
            "stands for a wildcard: write the layers into the wildcard, e.g. '*.layers.[01].q_proj'."
        )
    if not trained and config.init not in _INITS:
        raise ValueError(
            f"PEFT has no initialisation like `init={config.init!r}`; use one of {', '.join(_INITS)}, or write "
            "`trained=True` for an adapter whose factors are stored beside this configuration."
        )
    out: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": trained,
        "r": int(config.rank),
        "lora_alpha": plain_number(config.alpha),
        "lora_dropout": float(config.dropout),
        "target_modules": _plain_names(config.target_modules),
        "bias": config.bias,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True if trained else _INITS[config.init],
    }
    optional = {
        "exclude_modules": _plain_names(config.exclude_modules or ()),
        "layers_to_transform": _as_list(config.layers_to_transform),
        "layers_pattern": _as_list(config.layers_pattern),
        "rank_pattern": {k: int(v) for k, v in config.rank_pattern.items()},
        "alpha_pattern": {k: plain_number(v) for k, v in config.alpha_pattern.items()},
        "modules_to_save": list(config.modules_to_save),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "use_qalora": config.use_qalora,
        "qalora_group_size": config.qalora_group_size if config.use_qalora else None,
        "trainable_token_indices": config.to_dict()["trainable_token_indices"],
        "layer_replication": config.to_dict()["layer_replication"],
    }
    return {**out, **{key: value for key, value in optional.items() if value}}


def check_is_lora(data: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that names the method if `data` does not describe a LoRA adapter."""
    if "peft_type" not in data:
        raise ValueError(
            "this is no PEFT configuration: it has no `peft_type` ('LORA' for an adapter of this library)."
        )
    kind = getattr(data["peft_type"], "value", data["peft_type"])
    if kind != "LORA":
        raise ValueError(f"`peft_type={kind!r}` is another method than LoRA and is not implemented; only 'LORA' is.")


def without_init(data: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration beside trained factors, without the initialisation they started from.

    **Raises:** `ValueError` for an initialisation that also changed the base model (pissa, olora, corda, loftq,
    lora_ga) or that is not known here, so that the factors alone do not say what the adapter computes.
    """
    init = data.get("init_lora_weights", True)
    if str(init) not in _PLAIN_INITS:
        raise ValueError(
            f"`init_lora_weights={init!r}` changed the base model when training began, or is not known here, so these "
            "factors need not fit the original base: convert them in PEFT, `model.save_pretrained(path, "
            "path_initial_model_for_weight_conversion=...)`, or merge them there."
        )
    return {key: value for key, value in data.items() if key not in _INIT_SETTINGS}


def refused_fields(data: Mapping[str, Any]) -> list[str]:
    """What in `data` changes the computation and is not implemented here, one description each."""
    out = []
    for key in sorted(_REFUSED & set(data)):
        if data[key]:
            merge = "" if key in _NEVER_MERGED else ", or merge the adapter in PEFT (`merge_and_unload`)"
            out.append(f"`{key}={data[key]!r}` is not implemented: train without it{merge}")
    return out


def unknown_fields(data: Mapping[str, Any]) -> list[str]:
    """The keys of `data` that PEFT 0.21 does not have."""
    return sorted(set(map(str, data)) - _MAPPED - _IGNORED - _REFUSED)


def plain_number(value: float) -> int | float:
    """A whole number as an int, as PEFT writes it."""
    return int(value) if float(value).is_integer() else float(value)


def _targets(data: Mapping[str, Any]) -> Any:
    modules, parameters = data.get("target_modules"), data.get("target_parameters")
    if isinstance(parameters, str):
        raise ValueError(f"`target_parameters={parameters!r}` is a string; write a list: [{parameters!r}].")
    if isinstance(modules, str):
        if parameters and modules.lower() == "all-linear":
            raise ValueError(
                "`target_modules='all-linear'` together with `target_parameters` cannot be written as one list; "
                "name the linear modules."
            )
        return _one_regex([modules], parameters) if parameters else modules
    # PEFT stores "all-linear" as the list of what it means, excluded modules included.
    modules = sorted(modules) if isinstance(modules, set | frozenset) else modules or ()
    names = [n for n in modules if not _excluded(data.get("exclude_modules") or (), n)]
    if not data.get("layers_to_transform"):  # only then may a full name do more than an end of it
        names = [n for n in names if not any(n.endswith(f".{end}") for end in names)]
    return [*names, *(parameters or ())]


def _excluded(exclude: str | Sequence[str], name: str) -> bool:
    """Whether `exclude_modules` names, in PEFT's way, whatever ends with `name`."""
    if isinstance(exclude, str):
        return False  # an expression for whole names says nothing about an end of one
    return any(name == entry or name.endswith(f".{entry}") for entry in exclude)


def _plain_names(names: str | Sequence[str]) -> str | list[str]:
    """Names as PEFT reads them: a list of names, or one regular expression if any is a wildcard."""
    if isinstance(names, str):
        return _wildcard_as_regex(names)
    wild = [n for n in names if is_wildcard(n)]
    if not wild:
        return list(names)
    return _one_regex([_translate(n) for n in wild], [n for n in names if not is_wildcard(n)])


def _wildcard_as_regex(text: str) -> str:
    try:
        re.compile(text)
        return text
    except re.error:
        return _translate(text)


def _translate(wildcard: str) -> str:
    """A shell wildcard as a plain regular expression; `fnmatch.translate` uses groups that older Pythons lack."""
    parts = re.split(r"(\*|\?|\[!?[^]]+\])", wildcard)
    fixed = {"*": ".*", "?": "."}
    return "".join(fixed.get(p) or (p.replace("[!", "[^") if p.startswith("[") else re.escape(p)) for p in parts)


def _one_regex(regexes: Sequence[str], names: Sequence[str]) -> str:
    """One expression that fully matches what any of `regexes` does, and names that end with one of `names`."""
    parts = [f"(?:{r})" for r in regexes]
    parts += [rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"] if names else []
    return "|".join(parts)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
