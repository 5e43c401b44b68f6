"""The linen front end: an adapted model is used like a module, and its base stays as it was."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax as lj


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(24, name="dense")(x))


class Model(nn.Module):
    """Statistics, two methods, dropout, a cache and a sown intermediate: what `apply` has to carry."""

    features: int = 5

    def setup(self):
        self.encoder = Encoder()
        self.norm = nn.BatchNorm()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Dense(self.features)
        self.calls = self.variable("cache", "calls", lambda: jnp.zeros((), jnp.int32))

    def encode(self, x):
        return self.encoder(x)

    def __call__(self, x, train=False):
        h = self.encode(x)
        if self.is_mutable_collection("cache"):
            self.calls.value += 1
        self.sow("intermediates", "encoded", h)
        h = self.norm(h, use_running_average=not train)
        return self.head(self.drop(h, deterministic=not train))


X = jax.random.normal(jax.random.key(0), (6, 8))
CONFIG = lj.LoRAConfig(rank=3, alpha=6, target_modules=["dense", "head"], init="random")


@pytest.fixture(scope="module")
def setting():
    model = Model()
    variables = dict(model.init(jax.random.key(1), X))
    variables.pop("intermediates", None)
    adapted, adapter = lj.linen.adapt(model, variables["params"], CONFIG, X, key=jax.random.key(2), variables=variables)
    return model, variables, adapted, adapter


def merged(variables, adapter):
    return {**variables, "params": lj.merge(variables["params"], adapter)}


def close(got, want):
    """Within float32 rounding of sums of this size: relative to the largest element, since small ones cancel."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1e-3, np.abs(want).max()))


def test_apply_equals_the_merged_module_and_a_dropped_adapter_does_not(setting):
    model, variables, adapted, adapter = setting
    got = adapted.apply({**variables, "lora": adapter}, X)
    close(got, model.apply(merged(variables, adapter), X))
    zero = jax.tree.map(jnp.zeros_like, adapter)
    np.testing.assert_array_equal(adapted.apply({**variables, "lora": zero}, X), model.apply(variables, X))
    with pytest.raises(AssertionError):
        close(got, model.apply(variables, X))


def test_the_base_is_not_touched_or_copied(setting):
    model, variables, _, _ = setting
    leaves = jax.tree.leaves(variables["params"])
    before = [np.asarray(leaf) for leaf in leaves]
    adapted, adapter = lj.linen.adapt(model, variables["params"], CONFIG, X, key=jax.random.key(0), variables=variables)
    adapted.apply({**variables, "lora": adapter}, X)
    after = jax.tree.leaves(variables["params"])
    assert all(a is b for a, b in zip(leaves, after, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", ["encode", Model.encode, lambda m, x: m.encode(x) * 2])
def test_other_methods(setting, method):
    model, variables, adapted, adapter = setting
    got = adapted.apply({**variables, "lora": adapter}, X, method=method)
    close(got, model.apply(merged(variables, adapter), X, method=method))


def test_mutable_collections_and_rngs(setting):
    model, variables, adapted, adapter = setting
    rngs = {"dropout": jax.random.key(5)}
    kwargs = {"train": True, "rngs": rngs, "mutable": ["batch_stats", "cache", "intermediates"]}
    y, updated = adapted.apply({**variables, "lora": adapter}, X, **kwargs)
    want, want_updated = model.apply(merged(variables, adapter), X, **kwargs)
    close(y, want)
    jax.tree.map(close, updated, want_updated)
    assert int(updated["cache"]["calls"]) == int(variables["cache"]["calls"]) + 1
    assert not np.allclose(updated["batch_stats"]["norm"]["mean"], variables["batch_stats"]["norm"]["mean"])


def test_mutable_true_gives_params_and_adapter_back_unchanged(setting):
    _, variables, adapted, adapter = setting
    _, updated = adapted.apply({**variables, "lora": adapter}, X, mutable=True)
    assert updated["params"] is variables["params"] and updated["lora"] is adapter
    with pytest.raises(ValueError, match="'params'.* cannot be mutable"):
        adapted.apply({**variables, "lora": adapter}, X, mutable=["params"])


def test_capture_intermediates(setting):
    model, variables, adapted, adapter = setting
    kwargs = {"capture_intermediates": True, "mutable": ["intermediates"]}
    got = adapted.apply({**variables, "lora": adapter}, X, **kwargs)[1]
    jax.tree.map(close, got, model.apply(merged(variables, adapter), X, **kwargs)[1])


def test_bind_reaches_methods_parts_and_fields(setting):
    model, variables, adapted, adapter = setting
    bound = adapted.bind({**variables, "lora": adapter})
    reference = model.bind(merged(variables, adapter))
    close(bound(X), reference(X))
    close(bound.encode(X), reference.encode(X))
    close(bound.encoder(X), reference.encoder(X))
    assert bound.features == adapted.features == 5
    mutable = adapted.bind({**variables, "lora": adapter}, mutable=["cache"])
    mutable(X), mutable(X)
    assert int(mutable.variables["cache"]["calls"]) == int(variables["cache"]["calls"]) + 2


def test_init_makes_fresh_variables_with_an_adapter(setting):
    model, _, adapted, adapter = setting
    fresh = adapted.init({"params": jax.random.key(3), "lora": jax.random.key(4)}, X)
    assert set(fresh) >= {"params", "batch_stats", "cache", "lora"}
    jax.tree.map(np.testing.assert_array_equal, fresh["params"], model.init(jax.random.key(3), X)["params"])
    jax.tree.map(np.testing.assert_array_equal, fresh["lora"], adapted.plan.init(jax.random.key(4)))
    assert jax.tree.structure(fresh["lora"]) == jax.tree.structure(adapter)
    assert "lora" in adapted.init(jax.random.PRNGKey(3), X)


def test_train_state_trains_the_adapter_only(setting):
    _, variables, adapted, adapter = setting
    state = TrainState.create(apply_fn=adapted.apply, params=adapter, tx=optax.adamw(1e-2))

    @jax.jit
    def step(state, variables):
        def loss(lora):
            return (state.apply_fn({**variables, "lora": lora}, X) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(20):
        state, value = step(state, variables)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    assert isinstance(restored.params, lj.Adapter) and restored.params.sites == adapter.sites
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)


def test_dropout_needs_the_lora_rng(setting):
    model, variables, _, _ = setting
    adapted, adapter = lj.linen.adapt(
        model, variables["params"], CONFIG.replace(dropout=0.5), X, key=jax.random.key(2), variables=variables
    )
    full = {**variables, "lora": adapter}
    off = adapted.apply(full, X)
    close(off, model.apply(merged(variables, adapter), X))
    one, again, two = (adapted.apply(full, X, rngs={"lora": jax.random.key(k)}) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, two) and not np.allclose(one, off)
    np.testing.assert_array_equal(one, adapted.apply(full, X, rngs={"lora": jax.random.PRNGKey(1)}))
    # The low-rank branch is unbiased: the mean over masks of the first layer's pre-activation is the plain one.
    keys = jax.random.split(jax.random.key(9), 4000)

    def pre(key):
        rngs = None if key is None else {"lora": key}
        return jnp.arctanh(adapted.apply(full, X[:1] * 0.3, method="encode", rngs=rngs))

    samples = jax.jit(jax.vmap(pre))(keys)
    error = 6 * samples.std(0) / np.sqrt(len(keys)) + 1e-4
    assert (abs(samples.mean(0) - pre(None)) < error).all()


def test_errors_name_the_collection_and_the_leaf(setting):
    _, variables, adapted, adapter = setting
    with pytest.raises(ValueError, match="no `lora` collection"):
        adapted.apply(variables, X)
    tree = adapter.to_dict()
    del tree["head"]["lora_B"]
    with pytest.raises(ValueError, match="missing head/lora_B/kernel"):
        adapted.apply({**variables, "lora": tree}, X)
    with pytest.raises(ValueError, match=r"`hed`.*closest: `head`"):
        config = lj.LoRAConfig(target_modules=["hed"])
        lj.linen.adapt(Model(), variables["params"], config, X, key=jax.random.key(0), variables=variables)


def test_modules_to_save_are_trained_copies(setting):
    model, variables, _, _ = setting
    config = lj.LoRAConfig(rank=3, target_modules=["dense"], modules_to_save=["head"], init="random")
    adapted, adapter = lj.linen.adapt(model, variables["params"], config, X, key=jax.random.key(2), variables=variables)
    changed = jax.tree.map(lambda x: x + 0.25, adapter)
    got = adapted.apply({**variables, "lora": changed}, X)
    close(got, model.apply(merged(variables, changed), X))
    without_head = lj.merge(variables["params"], changed)
    without_head["head"] = variables["params"]["head"]
    assert not np.allclose(got, model.apply({**variables, "params": without_head}, X), atol=1e-2)
    grads = jax.grad(lambda a: adapted.apply({**variables, "lora": a}, X).sum())(adapter)
    assert (np.asarray(grads["head"]["bias"]) == len(X)).all()


def test_filters_never_let_merged_weights_out(setting):
    _, variables, adapted, adapter = setting
    full = {**variables, "lora": adapter}
    _, updated = adapted.apply(full, X, mutable=flax.core.DenyList("batch_stats"))
    assert set(updated) == {"cache", "intermediates"}
    with pytest.raises(ValueError, match="cannot be mutable"):
        adapted.apply(full, X, mutable=frozenset({"params", "cache"}))


def test_what_would_run_unadapted_is_refused(setting):
    _, variables, adapted, adapter = setting
    for name in ("clone", "init_with_output", "tabulate"):
        with pytest.raises(AttributeError, match=f"adapted.module.{name}"):
            getattr(adapted, name)


class Stack(nn.Module):
    """Submodules in a list, and arguments whose names `adapt` has itself."""

    def setup(self):
        self.layers = [nn.Dense(8, name=f"layer_{i}") for i in range(2)]

    def __call__(self, x, key=None, axis_roles=None):
        for layer in self.layers:
            x = layer(x)
        return x if key is None else x + jax.random.normal(key, x.shape) + axis_roles


def test_arguments_that_share_a_name_with_adapts_own():
    model, noise = Stack(), {"key": jax.random.key(7), "axis_roles": 2.0}
    params = model.init(jax.random.key(0), X)["params"]
    config = lj.LoRAConfig(rank=2, init="random")
    adapted, adapter = lj.linen.adapt(model, params, config, X, key=jax.random.key(1), call=noise)
    full = {"params": params, "lora": adapter}
    close(adapted.apply(full, X, **noise), model.apply({"params": lj.merge(params, adapter)}, X, **noise))
    bound, reference = adapted.bind(full), model.bind({"params": lj.merge(params, adapter)})
    close(bound.layers[1](X), reference.layers[1](X))
    assert bound.layers[1].features == 8
