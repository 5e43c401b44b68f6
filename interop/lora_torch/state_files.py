"""State dicts in files: one safetensors file, or a directory of torch's distributed checkpoint (DCP)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from .arrays import Kind, convert, ops_of, shape_dtype
from .files import FLOATS, INTEGERS, open_safetensors

_DCP_MARK = ".metadata"


def write_state_dict(
    state_dict: Mapping[str, Any], path: str | Path, *, format: Literal["safetensors", "dcp"] | None = None
) -> Path:
    """Writes flat tensors of any kind.

    **Arguments:** `format`: None takes `.safetensors` for a file and anything else for a DCP directory. DCP needs
    torch, and every process of a group has to call it.

    **Returns:** the path.

    **Raises:** `FileExistsError` if there is something; `TypeError` for values that are no dense arrays.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already; choose another path, or remove it")
    kind = format or ("safetensors" if path.suffix == ".safetensors" else "dcp")
    if kind == "safetensors":
        arrays = {name: ops_of("numpy").contiguous(_array(name, x, "numpy")) for name, x in state_dict.items()}
        save_file(arrays, path, {"format": "pt"})
    elif kind == "dcp":
        from torch.distributed.checkpoint.state_dict_saver import save

        tensors = {name: _array(name, x, "torch") for name, x in state_dict.items()}
        with _alone() as no_dist:
            save(tensors, checkpoint_id=path, no_dist=no_dist)
    else:
        raise ValueError(f"format={format!r} is none of 'safetensors' and 'dcp'")
    return path


def read_state_dict(path: str | Path, *, prefix: str = "", kind: Kind = "torch") -> dict[str, Any]:
    """The tensors of a safetensors file or a DCP directory, each in the dtype it has there.

    **Arguments:** `prefix`: only names that begin so, without it; in a checkpoint of `{"model": …, "optimizer": …}` the
    model's are below `"model."`. `kind` of the arrays; DCP needs torch whatever it is.

    **Raises:** `FileNotFoundError`; `ValueError` for a damaged file, another kind of directory, a prefix that no name
    has, or entries below it that are no tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        with open_safetensors(path) as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys() if name.startswith(prefix)}
            known = {**FLOATS, **INTEGERS}
            if wrong := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in known]:
                raise ValueError(f"{path}: numpy has no counterpart of the dtypes of {', '.join(wrong[:3])}")
            found = {name: np.asarray(file.get_tensor(name), known[dtype]) for name, dtype in kinds.items()}
    elif (path / _DCP_MARK).is_file():
        found = _read_dcp(path, prefix)
    else:
        raise ValueError(
            f"{path} is a directory without {_DCP_MARK}, so no DCP checkpoint; name the safetensors file in it"
        )
    if not found:
        raise ValueError(f"{path} holds no name that begins with {prefix!r}")
    return {name.removeprefix(prefix): convert(x, kind) for name, x in found.items()}


def _read_dcp(path: Path, prefix: str) -> dict[str, Any]:
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    entries = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
    if wrong := [name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]:
        raise ValueError(f"{path}: {', '.join(wrong[:3])} are no tensors; choose those that are by `prefix=`")
    out = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    if out:
        with _alone() as no_dist:
            load(out, checkpoint_id=path, no_dist=no_dist)
    return out


@contextmanager
def _alone() -> Iterator[bool]:
    """Whether this process is in no group: what torch, told so, warns of all the same."""
    import torch.distributed as dist

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield not (dist.is_available() and dist.is_initialized())


def _array(name: str, x: Any, kind: Kind) -> Any:
    try:
        shape_dtype(x)
        return convert(x, kind)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
