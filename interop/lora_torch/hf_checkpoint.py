"""A Hugging Face model directory in safetensors: its configuration, its shards, and its tensors when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import FLOATS, INTEGERS, open_safetensors, read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_UNQUANTISED = "only unquantised weights are read here. Use the unquantised model, and quantise the result."


class Entry(NamedTuple):
    shard: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The headers of a model directory; tensors are read when asked for."""

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

    def state_dict(self) -> dict[str, np.ndarray]:
        """Every tensor under its torch name, in the dtype it has in the file."""
        return dict(self.read({name: name for name in self.entries}))


def open_checkpoint(directory: str | PathLike[str]) -> Checkpoint:
    """Reads config.json, the index and every shard's header, and checks that they agree.

    **Raises:** `FileNotFoundError` for a directory without config.json or safetensors, or with a shard missing;
    `ValueError` for a quantised model, a damaged shard, or an index that does not say what the shards hold.
    """
    directory = Path(directory)
    config = read_model_config(directory)
    if config.get("quantization_config"):
        raise ValueError(f"{directory} is quantised (config.json has quantization_config); {_UNQUANTISED}")
    index, weight_map = None, {}
    if (directory / SINGLE).is_file():  # transformers, too, prefers the single file where there are both
        shards = [SINGLE]
    elif (directory / INDEX).is_file():
        index = read_json(directory / INDEX)
        weight_map = _weight_map(index, directory / INDEX)
        shards = sorted(set(weight_map.values()))
    else:
        other = ", ".join(sorted(p.name for p in directory.glob("*.bin"))[:3])
        raise FileNotFoundError(
            f"{directory} holds neither {SINGLE} nor {INDEX}"
            + (f", only {other}; save the model again with `save_pretrained`." if other else ".")
        )
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        path = directory / shard
        if not path.is_file():
            raise FileNotFoundError(f"{directory}: the shard {shard}, named in {INDEX}, is missing.")
        with open_safetensors(path) as file:
            metadata.update(file.metadata() or {})
            for name in file.keys():
                if name in entries:
                    raise ValueError(f"{directory}: {name} is in both {entries[name].shard} and {shard}.")
                entries[name] = Entry(shard, _dtype(file, name, path), tuple(file.get_slice(name).get_shape()))
    if not entries:
        raise ValueError(f"{directory}: {', '.join(shards)} holds no tensors.")
    placed = {name: entry.shard for name, entry in entries.items()}
    if index is not None and placed != weight_map:
        wrong = sorted(n for n in placed.keys() | weight_map.keys() if placed.get(n) != weight_map.get(n))
        raise ValueError(
            f"{directory / INDEX} disagrees with the shards about {len(wrong)} tensors: {', '.join(wrong[:5])}."
        )
    # transformers has refused files that do not say which framework wrote them.
    return Checkpoint(directory, config, entries, {"format": "pt", **metadata}, index)


def read_model_config(directory: str | PathLike[str]) -> dict[str, Any]:
    """A directory's `config.json`. **Raises:** `FileNotFoundError` if there is none, `ValueError` if it is no JSON."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a Hugging Face model directory: it has no {CONFIG}.")
    return read_json(path)


def check_sizes(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """**Raises** `ValueError` naming the entries of a config.json that are missing or no positive whole number."""
    wrong = {name: config.get(name) for name in names}
    wrong = {name: x for name, x in wrong.items() if not isinstance(x, int) or isinstance(x, bool) or x < 1}
    if wrong:
        told = ", ".join(f"`{name}` is {'missing' if x is None else repr(x)}" for name, x in wrong.items())
        raise ValueError(f"config.json: {told}; each must be a positive whole number.")


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
        raise ValueError(f"{path}: {name} is {kind}, a quantised type; {_UNQUANTISED}")
    return np.dtype(known[kind])
