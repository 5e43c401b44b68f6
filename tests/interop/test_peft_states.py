"""`LoraModel` and PEFT's, driven through the same steps: what is active, merged and trained, every scale, every output.

The steps are those of PEFT's own tests of several adapters; hypothesis puts them in orders that nobody thought of.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("peft")

from lora_jax import peft  # noqa: E402
from tests.front_ends.peft_mlp import BOTH, X, base  # noqa: E402
from tests.interop.test_peft_port import outputs, torch_twin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # both warn of what they do beside what was asked

# `up` and `down` have one module each, so that one of the two is without an adapter in use.
POOL = {
    "both": dict(r=2, lora_alpha=5, target_modules=BOTH),
    "up": dict(r=3, lora_alpha=2, target_modules=["up"], use_rslora=True),
    "down": dict(r=1, lora_alpha=3, target_modules=["down"]),
}
KEPT = ("both", "up")  # there from the start


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A function that makes both models anew, with equal factors."""
    folder = tmp_path_factory.mktemp("pool")
    module = base()
    for seed, (name, config) in enumerate(POOL.items()):
        torch.manual_seed(seed)
        source = theirs.get_peft_model(torch_twin(module), theirs.LoraConfig(**config, init_lora_weights=False))
        source.save_pretrained(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = theirs.PeftModel.from_pretrained(torch_twin(module), folder / "both", "both", is_trainable=True)
        mine = peft.PeftModel.from_pretrained(module, folder / "both", "both", is_trainable=True, inputs=(X,))
        for name in KEPT[1:]:
            twin.load_adapter(folder / name, name)
            mine.load_adapter(folder / name, name)

    def make():
        from flax import nnx

        return Pair(copy.deepcopy(twin), nnx.clone(mine), folder)

    return make


class Pair:
    """Each step on both sides."""

    def __init__(self, twin, mine, folder):
        self.twin, self.mine, self.folder = twin, mine, folder

    def add(self, name):
        if name in self.mine.peft_config:  # PEFT loads over it
            return self._refused(lambda: self.mine.load_adapter(self.folder / name, name))
        if self.mine.merged_adapters:  # PEFT takes them out again, without a word
            return None
        self.twin.load_adapter(self.folder / name, name)
        self.mine.load_adapter(self.folder / name, name)

    def set(self, *names):
        if set(names) - set(self.mine.peft_config):  # PEFT sets what is no adapter, in silence
            return self._refused(lambda: self.mine.set_adapter(list(names)))
        # The `PeftModel` of PEFT takes one name; the model inside of it takes several.
        self.twin.base_model.set_adapter(list(names))
        self.mine.set_adapter(list(names))

    def delete(self, name):
        if name not in self.mine.peft_config or name in self.mine.merged_adapters:
            self._refused(lambda: self.twin.base_model.delete_adapter(name))
            return self._refused(lambda: self.mine.delete_adapter(name))
        self.twin.base_model.delete_adapter(name)
        self.mine.delete_adapter(name)

    def merge(self, *names):
        if set(names) - set(self.mine.peft_config):  # PEFT passes over what is no adapter
            return self._refused(lambda: self.mine.merge_adapter(list(names)))
        self.twin.merge_adapter(list(names) or None)
        self.mine.merge_adapter(list(names) or None)

    def unmerge(self):
        self.twin.unmerge_adapter()
        self.mine.unmerge_adapter()

    def _refused(self, step):
        with pytest.raises(ValueError):
            step()

    def scale(self, method, *arguments):
        for module in self.twin.base_model.model.modules():
            if isinstance(module, theirs.tuners.lora.LoraLayer):
                getattr(module, method)(*arguments)
        for layer in self.mine.lora_layers().values():
            getattr(layer, method)(*arguments)

    def check(self):
        twin, mine = self.twin.base_model, self.mine
        status = mine.get_model_status()
        assert set(twin.peft_config) == set(status.available_adapters)
        assert twin.active_adapters == mine.active_adapters
        for name, layer in mine.lora_layers().items():
            its = getattr(twin.model, name.removesuffix(".kernel"))
            assert layer.scaling == pytest.approx(its.scaling)
            assert layer.merged_adapters == its.merged_adapters
            trained = {a: factor.weight.requires_grad for a, factor in its.lora_A.items()}
            assert trained == {a: status.requires_grad[a] for a in layer.r}
        np.testing.assert_allclose(outputs(twin), mine(X), atol=2e-5)


def test_several_active_at_once(pair):
    """Their changes add up, in any order; merging them changes nothing, and unmerging gives the base back."""
    both = pair()
    alone = {}
    for name in KEPT:
        both.set(name)
        both.check()
        alone[name] = np.asarray(both.mine(X))
    both.set("both", "up")
    both.check()
    together = np.asarray(both.mine(X))
    assert all(np.abs(together - one).max() > 0.01 for one in alone.values())
    both.set("up", "both")
    both.check()
    np.testing.assert_allclose(both.mine(X), together, atol=1e-5)
    both.merge("both")
    both.merge("up")
    both.check()
    np.testing.assert_allclose(both.mine(X), together, atol=1e-5)
    both.unmerge()
    both.check()
    with both.mine.disable_adapter(), both.twin.disable_adapter():
        np.testing.assert_allclose(outputs(both.twin), both.mine(X), atol=1e-5)
        assert np.array_equal(both.mine(X), base()(X))


def test_adapters_of_different_modules(pair):
    """An adapter is set, trained and deleted where it has a module, and leaves the other alone."""
    both = pair()
    both.add("down")
    both.check()
    for names in (("up",), ("down",), ("up", "down")):
        both.set(*names)
        both.check()
        assert {n for n, trained in both.mine.get_model_status().requires_grad.items() if trained} == set(names)
    both.delete("up")
    both.check()
    assert both.mine.active_adapters == ["down"]
    both.delete("down")  # the last active one: another takes its place
    both.check()
    assert both.mine.active_adapters == ["both"]
    both.delete("down")  # which is gone
    both.delete("both")
    both.check()
    assert np.array_equal(both.mine(X), base()(X))


@pytest.mark.parametrize("active", [("both",), ("up",), ("both", "up")])
def test_scales(pair, active):
    both = pair()
    both.set(*active)
    for step in (
        ("scale_layer", 2.0), ("scale_layer", 0.25), ("unscale_layer", 0.5), ("unscale_layer", None),
        ("set_scale", "up", 3.0), ("scale_layer", -1.5), ("set_scale", "both", 0.5), ("unscale_layer", 4.0),
        ("set_scale", "both", 0.0), ("unscale_layer", None),
    ):  # fmt: skip
        before = np.asarray(both.mine(X))
        both.scale(*step)
        both.check()
        if step[0] == "scale_layer":
            assert np.abs(np.asarray(both.mine(X)) - before).max() > 1e-3


names = st.sampled_from(list(POOL))
steps = st.one_of(
    st.tuples(st.just("add"), names),
    st.tuples(st.just("delete"), names),
    st.lists(names, min_size=1, max_size=3, unique=True).map(lambda found: ("set", *found)),
    st.lists(names, max_size=2, unique=True).map(lambda found: ("merge", *found)),
    st.just(("unmerge",)),
    st.tuples(st.just("scale"), st.just("scale_layer"), st.sampled_from([0.5, -2.0])),
)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.lists(steps, min_size=3, max_size=6))
def test_any_steps(pair, drawn):
    both = pair()
    for name, *arguments in drawn:
        getattr(both, name)(*arguments)
        both.check()
