"""Writing a merged model: the shards, their index, and the base's other files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_torch.hf_checkpoint import INDEX, SINGLE, Checkpoint

# Never copied: weights in any format, and what would describe them or make loaders look for an adapter.
WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|index\.json)$")
NOT_COPIED = ("adapter_config.json", "README.md")


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MiB" or "1000000"; powers of ten for KB, MB, GB, TB and of two for KiB, MiB, …"""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B|B)?\s*", text.upper())
    if not match:
        raise ValueError(f"{text!r} is not a size; write for example 5GB or 500MB.")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit) if unit else 0))
    if size < 1:
        raise ValueError(f"{text!r} is not a size; it must be at least one byte.")
    return size


def plan_shards(sizes: Mapping[str, tuple[str, int]], limit: int | None) -> dict[str, list[str]]:
    """Distributes tensors over files. **Arguments:** `sizes`: {name: (shard in the base, bytes)}, in order.

    Without a limit every tensor stays in its shard. With one, files are filled in order up to `limit` bytes; a
    tensor larger than the limit gets a file of its own.
    """
    if limit is None:
        shards: dict[str, list[str]] = {}
        for name, (shard, _) in sizes.items():
            shards.setdefault(shard, []).append(name)
        return shards
    groups: list[list[str]] = []
    room = 0
    for name, (_, nbytes) in sizes.items():
        if not groups or nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def write_shards(
    base: Checkpoint,
    out: Path,
    sources: Mapping[str, str],
    value: Callable[[str, np.ndarray], np.ndarray],
    limit: int | None,
    wrote: Callable[[str], None],
) -> None:
    """Writes the weights, one shard in memory at a time, and the index if there is more than one shard.

    **Arguments:** `sources`: {tensor to write: base tensor it comes from}; `value(name, base tensor)`: what to
    write, in the base's dtype; `wrote(file name)` is called after each shard.
    """
    sizes = {name: (base.entries[src].shard, base.entries[src].nbytes) for name, src in sources.items()}
    shards = plan_shards(sizes, limit)
    for shard, names in shards.items():
        read = base.read({name: sources[name] for name in names})
        # save_file writes the raw memory of a strided array under its shape: garbage.
        tensors = {name: np.ascontiguousarray(value(name, array)) for name, array in read}
        save_file(tensors, out / shard, metadata=base.metadata)
        del tensors
        wrote(shard)
    if len(shards) > 1 or (base.index is not None and limit is None):
        about = dict((base.index or {}).get("metadata") or {})
        about["total_size"] = sum(nbytes for _, nbytes in sizes.values())
        if "total_parameters" in about:
            about["total_parameters"] = sum(
                int(np.prod(base.entries[src].shape, dtype=np.int64)) for src in sources.values()
            )
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        write_json(out / INDEX, {"metadata": about, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_other_files(base: Checkpoint, out: Path) -> None:
    """Copies configuration, tokenizer, code and licence files: all but weights and the base's model card."""
    for root, folders, files in os.walk(base.directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith(".") or name in NOT_COPIED or WEIGHT_FILES.match(name):
                continue
            target = out / Path(root).relative_to(base.directory) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(root) / name, target)  # the Hub's cache holds links: copy what they point to
