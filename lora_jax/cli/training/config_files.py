"""Configurations from command lines and YAML files, with the defaults of their task.

The command line puts a task's defaults in place of `TrainConfig`'s before it reads the user's options, so that
`--print_config` shows what will run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli.training.config import TrainConfig

# What `task: causal-lm` means where the user says nothing else: SmolLM2-135M on Shakespeare.
_CAUSAL_LM: dict[str, Any] = {
    "output_dir": "runs/smollm2-shakespeare",
    "data.length": 64,
    "data.batch_size": 4,
    "data.held_out": 32,
    "optim.lr": 1e-3,
    "optim.steps": 60,
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora.modules_to_save": [],
    "eval_every": 20,
    "checkpoint_every": 20,
    "control": False,
}
TASK_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"classification": {}, "causal-lm": _CAUSAL_LM}

# How a run is done, not what it computes: these may differ between a run and its resumption.
_MANNER = ("output_dir", "log_every", "verify", "resume", "overwrite", "dry_run")


def task_defaults(words: Sequence[str]) -> dict[str, Any]:
    """The defaults of the task that a command line names, by `--task` or in the files of `--config`."""
    task = "classification"
    values = [*words, ""]
    for word, following in zip(words, values[1:], strict=True):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name == "--config" and Path(value).is_file():
            task = str(read_yaml(Path(value)).get("task", task))
        elif name == "--task":
            task = value
    return dict(TASK_DEFAULTS.get(task, {}), **({"task": task} if task in TASK_DEFAULTS else {}))


def read_config(path: Path) -> TrainConfig:
    """The configuration in a YAML file, with the defaults of its task where it says nothing.

    **Raises:** `ValueError` for an unknown or misspelt option and for a value of the wrong type.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, as_group=False, fail_untyped=True)
    given = read_yaml(path)
    parser.set_defaults(dict(TASK_DEFAULTS.get(str(given.get("task", "classification")), {})))
    try:
        return TrainConfig(**vars(parser.instantiate(parser.parse_object(given))))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """For YAML and JSON; `read_config` restores it."""
    return {**dataclasses.asdict(config), "lora": config.lora.to_dict()}


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """`name: old -> new` for every option in which two configurations compute something different."""
    first, second = (_flat(to_dict(with_absolute_paths(c))) for c in (old, new))
    return [
        f"{name}: {first.get(name)!r} -> {second.get(name)!r}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name) and name.split(".")[0] not in _MANNER
    ]


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same run, said so that it may be asked for from any folder."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else os.path.abspath(path)

    return dataclasses.replace(
        config,
        output_dir=os.path.abspath(config.output_dir),
        model=dataclasses.replace(config.model, path=absolute(config.model.path)),
        data=dataclasses.replace(config.data, path=absolute(config.data.path)),
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= _flat(value, name + ".") if isinstance(value, Mapping) and value else {name: value}
    return out


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. **Raises:** `ValueError` if there is none in it."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it should hold options, `name: value`.")
    # What is left of a group whose options are all commented out.
    if empty := [
        name for name in ("model", "data", "lora", "optim", "sample") if name in found and found[name] is None
    ]:
        raise ValueError(f"{path}: `{empty[0]}` is empty; write its options below it, indented, or leave it out.")
    return found
