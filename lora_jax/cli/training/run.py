"""The directory of a run: what it holds, who may write it, and where a stopped run goes on.

config.yaml      every option; `lora-jax train --config config.yaml` repeats the run
metrics.jsonl    one line per step and per evaluation
checkpoints/     orbax, one folder per saved step
adapter/         the PEFT directory
base/            the base as a Hugging Face directory, where it came from something else
curves.png
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import yaml

from lora_jax import checkpoint
from lora_jax.adapters import Adapter
from lora_jax.cli.training.config import TrainConfig
from lora_jax.cli.training.config_files import differences, read_config, read_yaml, to_dict, with_absolute_paths

OWN = ("metrics.jsonl", "checkpoints", "adapter", "base", "base.partial", "curves.png", "config.yaml")
TRAINING = "training"  # the item of a checkpoint with the learner's state
KEPT = 5  # checkpoints; the oldest go first


def holds_run(directory: Path) -> bool:
    """Whether the config.yaml there is one of ours: many programs keep a file of that name."""
    path = directory / "config.yaml"
    try:
        return path.is_file() and {"task", "lora", "optim"} <= read_yaml(path).keys()
    except ValueError:
        return False


class Run:
    """An open run directory.

    **Attributes:** `first_step`: the number of steps that are done; `records`: the lines of metrics.jsonl up to there,
    each with its `step` and its `kind`: `"train"`, `"held_out"` or `"sample"`.
    """

    def __init__(self, directory: Path, config: TrainConfig):
        self.directory, self.config = directory, config
        self.first_step = 0
        self.records: list[dict[str, Any]] = []

    @classmethod
    def open(cls, config: TrainConfig) -> Run:
        """A run that may be started in `config.output_dir`, or the one there with the place where it stopped.

        Nothing is written before `writing()`.

        **Raises:** `ValueError` if there is a run already and neither `resume` nor `overwrite` is given, if there is
        none to resume, or if it was started with other options.
        """
        run = cls(Path(config.output_dir), config)
        is_run = holds_run(run.directory)
        if config.resume:
            if not is_run:
                raise ValueError(f"{run.directory} holds no run to resume (no config.yaml); leave --resume out.")
            run._resume()
            return run
        if run.directory.exists() and (not run.directory.is_dir() or any(run.directory.iterdir())):
            if not is_run:
                raise ValueError(f"{run.directory} exists and is not a run; choose another --output_dir.")
            if not config.overwrite:
                raise ValueError(
                    f"{run.directory} holds a run already: go on with it by --resume, delete it by --overwrite, or "
                    "choose another --output_dir."
                )
        return run

    @classmethod
    def read(cls, directory: Path) -> Run:
        """A run to look at. **Raises:** `ValueError` if it is none."""
        if not (directory / "config.yaml").is_file():
            raise ValueError(f"{directory} holds no run (no config.yaml).")
        return cls(directory, read_config(directory / "config.yaml"))

    @property
    def metrics_path(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def steps_saved(self) -> list[int]:
        """Steps with a complete checkpoint. orbax renames a folder to its number when it is complete."""
        folder = self.directory / "checkpoints"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []

    def checkpoint(self, step: int | None = None) -> Path:
        """The folder of a checkpoint, the newest if None. **Raises:** `ValueError` naming those that there are."""
        steps = self.steps_saved
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" of step {step}; it has {steps or 'none'}"
            raise ValueError(f"{self.directory} has no checkpoint{wanted}.")
        return self.directory / "checkpoints" / str(steps[-1] if step is None else step)

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The last record with these values, e.g. `find(kind="held_out", model="base")`."""
        matching = [r for r in self.records if wanted.items() <= r.items()]
        return matching[-1] if matching else None

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Makes the directory, or cuts what lies behind the last checkpoint; then metrics and checkpoints go in."""
        import orbax.checkpoint as ocp

        if not self.config.resume:
            self._clear()
            self.directory.mkdir(parents=True, exist_ok=True)
            # Without what would stand in the way of `--config config.yaml --resume`, from any folder.
            kept = with_absolute_paths(dataclasses.replace(self.config, overwrite=False))
            _write(self.directory / "config.yaml", yaml.safe_dump(to_dict(kept), sort_keys=False))
        _write(self.metrics_path, "".join(json.dumps(r) + "\n" for r in self.records))
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        folder = (self.directory / "checkpoints").absolute()
        with self.metrics_path.open("a") as file, ocp.CheckpointManager(folder, options=options) as manager:
            yield Writer(self, file, manager)

    def load_state(self, like: Any) -> tuple[Adapter, Any]:
        """The adapter and the learner's state at `first_step`; `like` gives the state's structure."""
        import orbax.checkpoint as ocp

        folder = self.checkpoint(self.first_step)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            args = ocp.args.Composite(**{TRAINING: ocp.args.StandardRestore(target)})
            found = checkpointer.restore(folder.absolute(), args=args)
        return checkpoint.restore(folder), found[TRAINING]

    def _resume(self) -> None:
        old = read_config(self.directory / "config.yaml")
        if changed := differences(old, self.config):
            raise ValueError(
                f"the run in {self.directory} was started with other options ({'; '.join(changed)}). Give the same "
                f"again, or --config {self.directory / 'config.yaml'}."
            )
        self.first_step = max(self.steps_saved, default=0)
        # Lines behind the checkpoint will be written again; a line that a kill cut in two is among them.
        if self.metrics_path.is_file():
            whole = self.metrics_path.read_text().split("\n")[:-1]
            records = [self._record(line, number) for number, line in enumerate(whole, 1)]
            self.records = [r for r in records if r["step"] <= self.first_step]

    def _record(self, line: str, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
            if isinstance(found["step"], int) and isinstance(found["kind"], str):
                return found
        except (ValueError, TypeError, KeyError):
            pass
        raise ValueError(f"{self.metrics_path}, line {number} is no record of a run: {line[:60]!r}. Delete that line.")

    def _clear(self) -> None:
        """Deletes what a run writes, and nothing else that lies in the directory."""
        for name in OWN:
            path = self.directory / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class Writer:
    """Where a run's results go while it runs."""

    def __init__(self, run: Run, file: Any, manager: Any):
        self._run, self._file, self._manager = run, file, manager

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Appends one line to metrics.jsonl."""
        values = {"kind": kind, "step": step, **values}
        self._run.records.append(values)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def save(self, step: int, adapter: Adapter, state: Any) -> None:
        """Saves a checkpoint, after the metrics up to it are safely on the disk."""
        import orbax.checkpoint as ocp

        os.fsync(self._file.fileno())
        items = checkpoint.save_items(adapter, self._run.config.lora)
        self._manager.save(step, args=ocp.args.Composite(**items, **{TRAINING: ocp.args.StandardSave(state)}))


def _write(path: Path, text: str) -> None:
    """Writes a file that is there in full or not at all."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
