"""`lora-jax merge`: add a PEFT LoRA adapter to a Hugging Face base and write the result as a new directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_jax.cli._adapter import read_adapter
from lora_jax.cli._plan import plan_merge
from lora_jax.cli._shards import copy_other_files, parse_size, write_json, write_shards
from lora_torch.hf_checkpoint import open_checkpoint


@dataclass
class Report:
    """What a merge did. `change` and `rounding` are Frobenius norms over all changed tensors."""

    modules: int
    tensors: list[str]
    shards: list[str] = field(default_factory=list)
    change: float = 0.0
    rounding: float = 0.0


def merge(
    base_dir: str,
    adapter_dir: str,
    out_dir: str,
    *,
    max_shard_size: str | None = None,
    untie: bool = False,
    partial: bool = False,
) -> None:
    """Merge a PEFT LoRA adapter into a Hugging Face model directory, written as a new directory.

    Args:
        base_dir: The base model: config.json and model.safetensors or its shards. It is not changed.
        adapter_dir: The adapter: adapter_config.json and adapter_model.safetensors.
        out_dir: The directory to write; it must not exist yet.
        max_shard_size: Write shards of at most this size (5GB, 500MB). Default is the base's own shards.
        untie: If the adapter changes only one side of a tied embedding and head, store the two apart.
        partial: Accept an adapter whose file has no factors for some of the modules it targets.
    """
    from rich.console import Console

    from lora_jax.cli._show import console

    limit = None if max_shard_size is None else parse_size(max_shard_size)
    with Console(stderr=True, markup=False).status("merging") as status:
        report = merge_directories(
            Path(base_dir),
            Path(adapter_dir),
            Path(out_dir),
            limit=limit,
            untie=untie,
            partial=partial,
            wrote=lambda shard: status.update(f"merging: wrote {shard}"),
        )
    lost = report.rounding / report.change if report.change else 0.0
    out = console()
    out.print(f"merged {report.modules} modules; {len(report.tensors)} tensors changed by {report.change:.4g} (norm)")
    out.print(f"rounding to the base's dtype cost {lost:.2%} of that change")
    out.print(f"wrote {out_dir}: {', '.join(report.shards)}")


def merge_directories(
    base_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    limit: int | None = None,
    untie: bool = False,
    partial: bool = False,
    wrote: Callable[[str], None] = lambda shard: None,
) -> Report:
    """Merges and writes; `out_dir` appears only when it is complete, and nothing is left behind otherwise.

    **Arguments:** `limit`: bytes per shard, or the base's layout if None; `wrote(file name)` is called after each
    shard; the others as in `merge`.

    **Raises:** `ValueError` or `OSError` for anything that would make the result differ from the adapted model.
    """
    _check_out(base_dir, adapter_dir, out_dir)
    adapter, base = read_adapter(adapter_dir), open_checkpoint(base_dir)
    plan = plan_merge(adapter, base, untie, partial)
    report = Report(len(adapter.modules), sorted(plan.edits))
    squares = np.zeros(2)

    def value(name: str, array: np.ndarray) -> np.ndarray:
        if name not in plan.edits:
            return array
        try:
            new, change, loss = plan.edits[name].apply(array)
        except ValueError as error:
            raise ValueError(f"{name}: {error}.") from error
        squares[:] += change, loss
        return new

    def done(shard: str) -> None:
        report.shards.append(shard)
        wrote(shard)

    with _appearing(out_dir) as temporary:
        copy_other_files(base, temporary)
        if plan.config != base.config:
            write_json(temporary / "config.json", plan.config)
        write_shards(base, temporary, plan.sources, value, limit, done)
    report.change, report.rounding = map(float, np.sqrt(squares))
    return report


def _check_out(base_dir: Path, adapter_dir: Path, out_dir: Path) -> None:
    if os.path.lexists(out_dir):
        raise ValueError(f"{out_dir} exists already; name a new directory, nothing is overwritten.")
    if not out_dir.parent.is_dir():
        raise ValueError(f"{out_dir.parent} is not a directory; make it first.")
    for source in (base_dir, adapter_dir):
        if out_dir.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{out_dir} lies inside {source}; write the merged model elsewhere.")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` by one rename, or vanishes if anything goes wrong."""
    temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
    temporary.mkdir()
    try:
        yield temporary
        if os.path.lexists(out):  # a rename would replace an empty directory without a word
            raise ValueError(f"{out} was made by somebody else during the merge; nothing is overwritten.")
        temporary.rename(out)
    except BaseException:  # an interrupt, too
        shutil.rmtree(temporary)
        raise
