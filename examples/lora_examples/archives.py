"""Takes named members, and nothing else, out of a wheel or a source archive.

`zipfile.extractall` and `tarfile.extractall` trust the names inside an archive. Here every name written is
computed from a rule of ours, links and devices are refused, and a name that climbs out of the folder raises.
"""

import fnmatch
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

# A member's name, and how to open it. `None` marks what is not a plain file: a folder, link or device.
_Entries = Iterator[tuple[str, Callable[[], IO[bytes] | None] | None]]


def _zip_entries(archive: zipfile.ZipFile) -> _Entries:
    for info in archive.infolist():
        # The upper half of external_attr is the Unix mode; 0o12 in its top bits is a symbolic link.
        plain = not info.is_dir() and (info.external_attr >> 28) != 0o12
        yield info.filename, (lambda info=info: archive.open(info)) if plain else None


def _tar_entries(archive: tarfile.TarFile) -> _Entries:
    for info in archive:
        yield info.name, (lambda info=info: archive.extractfile(info)) if info.isfile() else None


def _is_safe(name: str) -> bool:
    """Whether `name` stays inside the folder it is joined to, on Unix and on Windows."""
    windows = PureWindowsPath(name)
    return not (
        name.startswith("/") or "\\" in name or windows.drive or windows.root or ".." in PurePosixPath(name).parts
    )


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Writes the members of `archive` that match a pattern into `folder`, which must exist.

    **Arguments:**

    - `archive`: a `.whl` or `.zip`, or a tar file with any compression that `tarfile` reads.
    - `members`: from a shell pattern on the member's full name to the sub-folder of `folder` it goes to
        (`""`: `folder` itself). Only the last part of a member's name is kept.

    **Raises:** `ValueError` for a file that is neither kind of archive, for a pattern that matches nothing,
    for a matching member that is a link or whose name leaves the archive, and for two members that would be
    written to one file.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            _extract(archive.name, _zip_entries(opened), members, folder)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            _extract(archive.name, _tar_entries(opened), members, folder)
    else:
        raise ValueError(f"`{archive.name}` is neither a zip (wheel) nor a tar file. Delete it and fetch again.")


def _extract(archive: str, entries: _Entries, members: Mapping[str, str], folder: Path) -> None:
    unmatched = set(members)
    for name, open_member in entries:
        pattern = next((p for p in members if fnmatch.fnmatchcase(name, p)), None)
        if pattern is None:
            continue
        if not _is_safe(name):
            raise ValueError(f"`{archive}` has a member named {name!r}, which leaves its folder. Nothing is extracted.")
        if open_member is None:
            raise ValueError(f"Member {name!r} of `{archive}` is not a plain file but a folder, link or device.")
        target = folder / members[pattern] / PurePosixPath(name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = open_member()
        assert source is not None  # tarfile returns None for entries that are no plain file, excluded above
        try:
            with source, target.open("xb") as written:
                shutil.copyfileobj(source, written, 1 << 20)
        except FileExistsError:
            raise ValueError(f"Two members of `{archive}` would both be written to `{target.name}`.") from None
        unmatched.discard(pattern)
    if unmatched:
        raise ValueError(f"`{archive}` has no member that matches {sorted(unmatched)}; is it another version?")
