"""The nnx front end: an adapted module is used like its base, whose arrays it shares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(24, 24, rngs=rngs)
        self.width = 24

    def __call__(self, x):
        return x + self.linear(x)

    def twice(self, x):
        return self(self(x))


class Counter(nnx.Variable):
    pass


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 24, rngs=rngs)
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.down = nnx.Linear(24, 5, rngs=rngs)
        self.calls = Counter(jnp.zeros((), jnp.int32))

    def encode(self, x):
        x = self.drop(nnx.relu(self.norm(self.up(x))))
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x):
        self.calls[...] += 1
        return self.down(self.encode(x))


X = jax.random.normal(jax.random.key(0), (6, 8))
CONFIG = lj.LoRAConfig(rank=3, alpha=6, init="random")


def adapt(config=CONFIG):
    base = Model(nnx.Rngs(0))
    return base, lj.nnx.adapt(base, config, X, rngs=nnx.Rngs(1))


def fresh(state):
    """New variables with the same values: nnx forbids changing outer ones from inside a transform."""
    return jax.tree.map(lambda x: x, state)


def close(got, want):
    """Within float32 rounding of sums of this size: relative to the largest element, since small ones cancel."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1e-3, np.abs(want).max()))


def test_equals_the_merged_module_and_a_dropped_adapter_does_not():
    base, model = adapt()
    model.eval()
    merged = lj.nnx.merge(model)
    close(model(X), merged(X))
    with pytest.raises(AssertionError):
        close(model(X), base(X))
    lj.nnx.set_adapter(model, jax.tree.map(jnp.zeros_like, lj.nnx.adapter_of(model)))
    np.testing.assert_array_equal(model(X), base(X))


def test_adapting_shares_the_base_and_advances_nothing():
    base = Model(nnx.Rngs(0))
    before = [v.get_value() for v in jax.tree.leaves(nnx.state(base), is_leaf=lambda x: isinstance(x, nnx.Variable))]
    model = lj.nnx.adapt(base, CONFIG, X, rngs=nnx.Rngs(1))
    after = [v.get_value() for v in jax.tree.leaves(nnx.state(base), is_leaf=lambda x: isinstance(x, nnx.Variable))]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert model.base is base and int(base.calls[...]) == 0
    kernel = base.up.kernel.get_value()
    model.eval()
    model(X)
    assert base.up.kernel.get_value() is kernel


def test_optimizer_and_diff_state_train_only_the_factors():
    base, model = adapt(CONFIG.replace(dropout=0.1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    kernels = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(base, nnx.Param)))
    statistics, dropped = np.asarray(base.norm.mean[...]), int(base.drop.rngs.count[...])

    @nnx.jit
    def step(model, optimizer):
        def loss(m):
            return ((m(X) - 1) ** 2).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value, len(jax.tree.leaves(grads))

    values = [step(model, optimizer) for _ in range(15)]
    assert float(values[-1][0]) < 0.7 * float(values[0][0])
    assert int(values[0][1]) == 2 * len(lj.nnx.plan_of(model).sites) == 8
    after = nnx.to_pure_dict(nnx.state(base, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, kernels, after)
    assert int(base.calls[...]) == 15
    assert int(base.drop.rngs.count[...]) == dropped + 15
    assert not np.allclose(base.norm.mean[...], statistics)


def test_train_and_eval_reach_base_and_low_rank_dropout():
    base, model = adapt(CONFIG.replace(dropout=0.5))
    base.drop.rate = 0.0  # leaves the low-rank branch's dropout as the only randomness
    model.train()
    base.norm.use_running_average = True
    assert not np.allclose(model(X), model(X))
    model.eval()
    assert base.drop.deterministic and base.norm.use_running_average
    np.testing.assert_array_equal(model(X), model(X))
    close(model(X), lj.nnx.merge(model)(X))


def test_methods_parts_and_attributes_of_the_base():
    base, model = adapt()
    model.eval()
    merged = lj.nnx.merge(model)
    close(model.encode(X), merged.encode(X))
    h = jax.random.normal(jax.random.key(3), (4, 24))
    close(model.blocks[1](h), merged.blocks[1](h))
    close(model.blocks[0].twice(h), merged.blocks[0].twice(h))
    close(model.blocks[1].linear(h), merged.blocks[1].linear(h))
    assert [block.width for block in model.blocks] == [24, 24] and len(model.blocks) == 2
    assert not np.allclose(model.blocks[1](h), base.blocks[1](h))
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_split_merge_jit_and_clone():
    base, model = adapt()
    model.eval()
    want = np.asarray(model(X))
    graphdef, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    close(nnx.merge(graphdef, factors, rest)(X), want)
    close(nnx.clone(model)(X), want)
    close(nnx.jit(lambda m, x: m(x))(model, X), want)
    gradients = jax.grad(lambda f: nnx.merge(graphdef, f, fresh(rest))(X).sum())(factors)

    # The same gradients through an explicitly merged model.
    adapter = lj.nnx.adapter_of(model)
    base_def, params, others = nnx.split(base, nnx.Param, ...)
    explicit = jax.grad(lambda a: nnx.merge(base_def, lj.merge(params, a), fresh(others))(X).sum())(adapter)
    ours = nnx.to_pure_dict(gradients)["lora"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, explicit.to_dict())


def test_adapter_round_trip_and_errors():
    _, model = adapt()
    model.eval()
    adapter = lj.nnx.adapter_of(model)
    want = np.asarray(model(X))
    lj.nnx.set_adapter(model, jax.tree.map(lambda x: -x, adapter))
    lj.nnx.set_adapter(model, adapter.to_dict())
    np.testing.assert_array_equal(model(X), want)
    with pytest.raises(ValueError, match="missing up/lora_A/kernel"):
        lj.nnx.set_adapter(model, {"down": adapter["down"]})
    with pytest.raises(ValueError, match=r"`upp`.*closest: `up`"):
        lj.nnx.adapt(Model(nnx.Rngs(0)), lj.LoRAConfig(target_modules=["upp"]), X, rngs=nnx.Rngs(0))


def test_modules_to_save_start_at_the_base_and_train():
    base = Model(nnx.Rngs(0))
    config = lj.LoRAConfig(rank=2, target_modules=["up"], modules_to_save=["down"])
    model = lj.nnx.adapt(base, config, X, rngs=nnx.Rngs(1))
    model.eval()
    np.testing.assert_array_equal(model(X), base(X))
    changed = jax.tree.map(lambda x: x + 0.5, lj.nnx.adapter_of(model))
    lj.nnx.set_adapter(model, changed)
    close(model(X), lj.nnx.merge(model)(X))
    assert not np.allclose(model(X), base(X))


class Odd(nnx.Module):
    """Side effects beyond plain state: a jitted method, a counter, streams and variables as arguments."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5)
        self.count = 0

    def __call__(self, x, rngs=None, total=None):
        self.count += 1
        if total is not None:
            total[...] += 1
        return self.drop(self.norm(self.linear(x)), rngs=rngs)

    @nnx.jit
    def jitted(self, x):
        return self.linear(x)


def odd():
    base = Odd(nnx.Rngs(0))
    model = lj.nnx.adapt(base, lj.LoRAConfig(rank=2, init="random"), X, rngs=nnx.Rngs(1), call={"rngs": nnx.Rngs(2)})
    assert base.count == 0
    return base, model


def test_jitted_methods_run_adapted():
    base, model = odd()
    close(model.jitted(X), lj.nnx.merge(model).jitted(X))
    assert not np.allclose(model.jitted(X), base.jitted(X))


def test_state_that_comes_as_an_argument_advances():
    base, model = odd()
    stream, total = nnx.Rngs(dropout=3), nnx.Variable(jnp.zeros(()))
    first, second = (model(X, rngs=stream, total=total) for _ in range(2))
    assert int(stream.dropout.count[...]) == 2 and float(total[...]) == 2 and base.count == 2
    assert not np.allclose(first, second)
    nnx.jit(lambda m, s, t: m(X, rngs=s, total=t))(model, stream, total)
    assert int(stream.dropout.count[...]) == 3 and float(total[...]) == 3


def test_a_model_in_evaluation_mode_can_be_closed_over():
    base = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    model = lj.nnx.adapt(base, lj.LoRAConfig(rank=2, init="random"), X, rngs=nnx.Rngs(1))
    model.eval()
    want = model(X)
    close(jax.jit(lambda x: model(x))(X), want)
    close(jax.vmap(lambda x: model(x[None])[0])(X), want)
    assert jax.grad(lambda x: model(x).sum())(X).shape == X.shape


def test_modes_and_attributes_reach_the_base():
    base, model = odd()
    model.drop.eval()
    assert base.drop.deterministic and not base.norm.use_running_average
    model.count = 7
    model.drop.rate = 0.25
    assert base.count == 7 and base.drop.rate == 0.25
    seen = nnx.view(model, deterministic=True, use_running_average=True)
    close(seen(X), seen(X))


def test_merging_gives_an_independent_module():
    base, model = odd()
    mean = np.asarray(base.norm.mean[...])
    merged = lj.nnx.merge(model)
    merged(X, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(base.norm.mean[...], mean)
    assert not np.array_equal(merged.norm.mean[...], mean)


def test_adapting_twice_is_refused():
    _, model = odd()
    with pytest.raises(ValueError, match=r"already holds 2 `nnx.LoRAParam`s \(`lora.linear.lora_A.kernel`"):
        lj.nnx.adapt(model, lj.LoRAConfig(), X, rngs=nnx.Rngs(0), call={"rngs": nnx.Rngs(2)})


def test_caches_made_through_the_adapted_model():
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(5), (1, 4, 8))
    model = lj.nnx.adapt(attention, lj.LoRAConfig(rank=2, init="random"), x, rngs=nnx.Rngs(1))
    want = lj.nnx.merge(model)(x, mask=nnx.make_causal_mask(jnp.ones((1, 4))))
    model.init_cache((1, 4, 8))
    model.set_attributes(decode=True)
    steps = [model(x[:, i : i + 1]) for i in range(4)]
    close(jnp.concatenate(steps, axis=1), want)
    assert int(attention.cache_index[...]) == 4


def test_an_adapter_brings_its_own_alpha():
    base, model = adapt()
    model.eval()
    other = lj.nnx.adapt(base, CONFIG.replace(alpha=60), X, rngs=nnx.Rngs(1))
    other.eval()
    lj.nnx.set_adapter(model, lj.nnx.adapter_of(other))
    close(model(X), other(X))
    close(model(X), lj.nnx.merge(model)(X))
