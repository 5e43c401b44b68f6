"""BERT against torch's, with random weights in every place."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_examples import bert
from lora_torch import StateDictError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random classifier as transformers saves it, and the same encoder alone, as MiniLM's package has it."""
    config = transformers.BertConfig(
        vocab_size=67,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=80,
        max_position_embeddings=24,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("bert")
    model.save_pretrained(directory / "classifier")
    model.bert.save_pretrained(directory / "encoder")
    return model, directory


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    ids, types = rng.integers(1, 67, (3, 11)), rng.integers(0, 2, (3, 11))
    mask = (np.arange(11) < np.array([[11], [7], [2]])).astype(np.int64)
    return ids, mask, types


def test_classifier_equals_torch(saved, batch):
    theirs, directory = saved
    ids, mask, types = batch
    with torch.no_grad():
        want = theirs(*map(torch.tensor, batch)).logits.numpy()
    model, params = bert.load(directory / "classifier", num_labels=3)
    logits = jax.jit(model.apply)({"params": params}, ids, mask, types)
    np.testing.assert_allclose(logits, want, atol=1e-5)
    # Mask and token types matter, and have the same defaults as torch's.
    for left_out in ((ids,), (ids, mask), (ids, None, types)):
        mine = jax.jit(model.apply)({"params": params}, *left_out)
        with torch.no_grad():
            default = theirs(*[None if a is None else torch.tensor(a) for a in left_out]).logits.numpy()
        np.testing.assert_allclose(mine, default, atol=1e-5)
        assert np.abs(mine - want).max() > 1e-3


def test_encoder_without_a_head(saved, batch):
    theirs, directory = saved
    ids, mask, types = batch
    model, params = bert.load(directory / "encoder", num_labels=5)
    with torch.no_grad():
        want = theirs.bert(*map(torch.tensor, batch))
    hidden, pooled = jax.jit(bert.Bert(model.config).apply)({"params": params["bert"]}, ids, mask, types)
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(hidden)[real], want.last_hidden_state.numpy()[real], atol=1e-5)
    np.testing.assert_allclose(pooled, want.pooler_output.numpy(), atol=1e-5)
    logits = jax.jit(model.apply)({"params": params}, ids, mask, types)
    assert logits.shape == (3, 5) and not logits.any()


def test_names_are_those_of_torch(saved):
    theirs, directory = saved
    _, params = bert.load(directory / "classifier", num_labels=3)
    paths = [[key.key for key in path] for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    kinds = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    assert {".".join([*path[:-1], kinds[path[-1]]]) for path in paths} == set(theirs.state_dict())


def test_bfloat16(saved, batch):
    theirs, directory = saved
    model, params = bert.load(directory / "classifier", num_labels=3, dtype=jnp.bfloat16)
    logits = jax.jit(model.apply)({"params": params}, *batch)
    with torch.no_grad():
        want = theirs(*map(torch.tensor, batch)).logits.numpy()
    assert logits.dtype == jnp.bfloat16
    assert 1e-5 < np.abs(np.asarray(logits, np.float32) - want).max() < 0.05 * np.abs(want).max()


def test_what_does_not_fit_is_refused(saved, tmp_path):
    _, directory = saved
    with pytest.raises(StateDictError) as error:
        bert.load(directory / "classifier", num_labels=2)
    assert sorted(error.value.misshapen) == ["classifier.bias", "classifier.weight"]
    with pytest.raises(FileNotFoundError, match="config.json"):
        bert.load(tmp_path)
    config = json.loads((directory / "encoder/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        bert.load(tmp_path)
    for edit in ({"hidden_act": "relu"}, {"position_embedding_type": "relative_key"}, {"model_type": "roberta"}):
        with pytest.raises(ValueError, match=next(iter(edit))):
            bert.BertConfig.from_hf(config | edit)
    with pytest.raises(ValueError, match="hidden_size=48 is not a multiple of num_attention_heads=5"):
        bert.BertConfig.from_hf(config | {"num_attention_heads": 5})
