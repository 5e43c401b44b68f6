"""What `lora-jax tune` measured on this machine, in a file of the user's.

`$LORA_JAX_CACHE/tuned.json`, else `tuned.json` in `$XDG_CACHE_HOME/lora_jax`, else in `~/.cache/lora_jax`. A process
reads it once, when it first chooses a kernel, so that all of its traces choose alike; and because tiles are chosen
while JAX traces, what was compiled before does not change either. A measurement counts for the device's kind, this jax
and these very kernels, by a digest of their sources, or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_jax.kernels.shape_class import ShapeClass

SCHEMA = 1
Key = tuple[str, str, ShapeClass]  # device, kernel or "implementation", shape
Entries = dict[Key, dict[str, Any]]


class TuningCacheWarning(UserWarning):
    """The user's file of measurements can't be used."""


def path() -> Path:
    """**Raises:** `OSError` where there is no home to put it into."""
    try:
        return _path()
    except RuntimeError as error:  # `pathlib`'s, for a user whom the system does not know
        raise OSError(f"{error} Set LORA_JAX_CACHE or HOME to a folder.") from error


def _path() -> Path:
    if own := os.environ.get("LORA_JAX_CACHE"):
        return Path(own).expanduser() / "tuned.json"
    # The XDG specification says that a relative value is to be ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "lora_jax" / "tuned.json"


@functools.cache
def kernels() -> str:
    """Tells these kernels and this jax from others."""
    digest = hashlib.sha256(version("jax").encode())
    for each in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(each.read_bytes())
    return digest.hexdigest()[:12]


def find(device: str, kernel: str, shape: ShapeClass) -> Mapping[str, Any] | None:
    """What was measured for this, or None."""
    key = (device, kernel, shape)
    return _trials[-1].get(key) if _trials and key in _trials[-1] else known().get(key)


@contextlib.contextmanager
def trying(entries: Entries) -> Iterator[None]:
    """Inside, `entries` come before the file: to time what is not yet in it."""
    _trials.append(entries)
    try:
        yield
    finally:
        _trials.pop()


_trials: list[Entries] = []


@functools.cache
def known() -> Entries:
    """What counts here, of the file as it was when first asked for."""
    file: Any = "the user's file of measurements"
    try:
        file = path()
        return {key: entry for key, entry in _read(file).items() if entry["kernels"] == kernels()}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{file} is ignored, and the tiles and implementations that ship are used: {error}. "
            "Delete it, or set LORA_JAX_CACHE to another folder; `lora-jax tune` makes a new one.",
            TuningCacheWarning,
            stacklevel=2,
        )
        return {}


def reread() -> None:
    """Forgets what was read. What JAX has traced by now stays as it is: see `jax.clear_caches`."""
    known.cache_clear()


def store(entries: Entries) -> Path:
    """Puts `entries` beside those in the file, in the place of those they repeat, and replaces the file in one step.

    This process goes on with what it read before. Of two that store at the same moment, the later wins.

    **Raises:** `ValueError` where the file is none of these, `OSError` where it can't be written.
    """
    file = path()
    merged = _kept(file) | entries
    lines = [
        {"device": device, "kernel": kernel, "shape": asdict(shape), **entry}
        for (device, kernel, shape), entry in merged.items()
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"schema": SCHEMA, "entries": lines}, out, indent=1)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
    return file


def check() -> None:
    """**Raises:** as `store`: for those who measure for minutes before they do."""
    file = path()
    _kept(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=file.parent).close()


def _kept(file: Path) -> Entries:
    try:
        return _read(file)
    except ValueError as error:
        raise ValueError(f"{file} would be overwritten, but {error}; delete it or set LORA_JAX_CACHE.") from error


def _read(file: Path) -> Entries:
    """**Raises:** `ValueError` with what is wrong in the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError("it is no file of `lora-jax tune`")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {content.get('schema')!r}, and this version of lora-jax reads {SCHEMA}")
    return dict(_entry(line, i) for i, line in enumerate(content["entries"]))


def _entry(line: Any, index: int) -> tuple[Key, dict[str, Any]]:
    try:
        rest = dict(line)
        device, kernel, shape = rest.pop("device"), rest.pop("kernel"), ShapeClass(**rest.pop("shape"))
        sizes, flags = (shape.m, shape.k, shape.n, shape.rank), (shape.dropped, shape.transposed)
        times = rest["microseconds"]
        good = (
            all(type(v) is str for v in (device, kernel, rest["kernels"], rest["date"]))
            and all(type(v) is int and v >= 0 for v in sizes)
            and all(type(v) is bool for v in flags)
            and all(type(v) in (int, float) and v > 0 for v in times.values())
            and (rest["winner"] in times if kernel == "implementation" else type(rest["config"]) is dict)
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its entry {index} is damaged ({type(error).__name__}: {error})") from error
    if not good:
        raise ValueError(f"its entry {index} is damaged ({line})")
    return (device, kernel, shape), rest
