"""A Hugging Face model directory in safetensors: what it holds, its shards, and writing another like it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from lora_jax.cli._tensors import FLOATS, INTEGERS, open_safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Never copied: weights in any format, and what would describe them or make loaders look for an adapter.
WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|index\.json)$")
NOT_COPIED = ("adapter_config.json", "README.md")


class Entry(NamedTuple):
    shard: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Base:
    """The headers of a base directory; tensors are read when asked for."""

    directory: Path
    config: dict[str, Any]
    entries: dict[str, Entry]  # in the order of the shards
    metadata: dict[str, str]
    index: dict[str, Any] | None  # of a sharded checkpoint

    def read(self, names: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
        """(key, tensor `names[key]`) for each key, opening each shard once."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for key, name in names.items():
                shard = self.entries[name].shard
                if shard not in files:
                    files[shard] = stack.enter_context(open_safetensors(self.directory / shard))
                yield key, files[shard].get_tensor(name)

    def tensor(self, name: str) -> np.ndarray:
        return next(self.read({name: name}))[1]


def open_base(directory: Path | str) -> Base:
    """Reads config.json, the index and every shard's header, and checks that they agree.

    **Raises:** `ValueError` for a directory without safetensors, a quantised one, a damaged shard, or an index
    that does not say what the shards hold.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is not a Hugging Face model directory: it has no config.json.")
    config = read_json(directory / "config.json")
    if config.get("quantization_config"):
        raise ValueError(
            f"{directory} is quantised (config.json has quantization_config); an update cannot be added to "
            "quantised weights. Merge into the unquantised model and quantise the result."
        )
    index, weight_map = None, {}
    if (directory / SINGLE).is_file():  # transformers, too, prefers the single file where there are both
        shards = [SINGLE]
    elif (directory / INDEX).is_file():
        index = read_json(directory / INDEX)
        weight_map = _weight_map(index, directory / INDEX)
        shards = sorted(set(weight_map.values()))
    else:
        other = ", ".join(sorted(p.name for p in directory.glob("*.bin"))[:3])
        raise ValueError(
            f"{directory} holds neither {SINGLE} nor {INDEX}"
            + (f", only {other}; save the model again with `save_pretrained`." if other else ".")
        )
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        path = directory / shard
        if not path.is_file():
            raise ValueError(f"{directory}: the shard {shard}, named in {INDEX}, is missing.")
        with open_safetensors(path) as file:
            metadata.update(file.metadata() or {})
            for name in file.keys():
                if name in entries:
                    raise ValueError(f"{directory}: {name} is in both {entries[name].shard} and {shard}.")
                entries[name] = Entry(shard, _dtype(file, name, path), tuple(file.get_slice(name).get_shape()))
    placed = {name: entry.shard for name, entry in entries.items()}
    if index is not None and placed != weight_map:
        wrong = sorted(n for n in placed.keys() | weight_map.keys() if placed.get(n) != weight_map.get(n))
        raise ValueError(
            f"{directory / INDEX} disagrees with the shards about {len(wrong)} tensors: {', '.join(wrong[:5])}."
        )
    # transformers has refused files that do not say which framework wrote them.
    return Base(directory, config, entries, {"format": "pt", **metadata}, index)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object.")
    return value


def _weight_map(index: Mapping[str, Any], path: Path) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map.")
    for name, shard in weight_map.items():
        # A shard is a file of this directory: an index must not send us to "../../elsewhere".
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{path} places {name} in {shard!r}, which is not the name of a shard.")
    return weight_map


def _dtype(file: Any, name: str, path: Path) -> np.dtype:
    kind = file.get_slice(name).get_dtype()
    known = {**FLOATS, **INTEGERS}
    if kind not in known:
        raise ValueError(
            f"{path}: {name} is {kind}, a quantised type; an update cannot be added to it. Merge into the "
            "unquantised model and quantise the result."
        )
    return np.dtype(known[kind])


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
    base: Base,
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


def copy_other_files(base: Base, out: Path) -> None:
    """Copies configuration, tokenizer, code and licence files: all but weights and the base's model card."""
    for root, folders, files in os.walk(base.directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith(".") or name in NOT_COPIED or WEIGHT_FILES.match(name):
                continue
            target = out / Path(root).relative_to(base.directory) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(root) / name, target)  # the Hub's cache holds links: copy what they point to
