"""An adapter must come back from disk complete: values, dtypes, structure, and what it adapts."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lora_jax as lj
from lora_jax import checkpoint
from tests.core.harness import normal


def forward(params, tokens):
    x = params["embed"]["embedding"][tokens]
    x = jnp.einsum("btd,dhk->bthk", x, params["split"]["kernel"]).reshape(*tokens.shape, -1)
    for kernel in params["stack"]["kernel"]:
        x = jnp.tanh(x @ kernel)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


CONFIG = lj.LoRAConfig(
    rank=3, alpha=7, target_modules=["embed", "split", "stack"], modules_to_save=["head"],
    rank_pattern={"split": 2}, use_rslora=True, init="random",
)  # fmt: skip
TOKENS = jnp.arange(6).reshape(2, 3)


@pytest.fixture(scope="module")
def trained():
    """(params, plan, adapter): an embedding, split heads, a stack, a saved head; every leaf is random."""
    params = {
        "embed": {"embedding": normal(11, 6)},
        "split": {"kernel": normal(6, 2, 4)},
        "stack": {"kernel": normal(2, 8, 8)},
        "head": {"kernel": normal(8, 3), "bias": normal(3)},
    }
    params = jax.tree.map(jnp.asarray, params)
    plan = lj.plan(forward, params, TOKENS, config=CONFIG)
    abstract = jax.eval_shape(plan.init, jax.random.key(0), params)
    return params, plan, jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape, seed=1)), abstract)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)  # holds the sites: rank, alpha, roles
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_restores_without_the_plan(trained, tmp_path):
    params, plan, adapter = trained
    checkpoint.save(tmp_path / "a", adapter, config=CONFIG)
    found = checkpoint.restore(tmp_path / "a")
    assert_same(found, adapter)
    assert checkpoint.read_config(tmp_path / "a") == CONFIG
    assert checkpoint.read_sites(tmp_path / "a") == plan.sites

    # Nothing but the base and the file: the merged model is the adapted one, and not the base.
    want = jax.jit(lj.apply(forward, plan))(params, adapter, TOKENS)
    run = jax.jit(forward)
    np.testing.assert_allclose(run(lj.merge(params, found), TOKENS), want, atol=2e-5)
    assert np.abs(want - run(params, TOKENS)).max() > 0.1


def test_keeps_each_leaf_s_dtype(trained, tmp_path):
    _, _, adapter = trained
    mixed = jax.tree.map_with_path(lambda p, x: x.astype(jnp.bfloat16) if "lora_A" in str(p) else x, adapter)
    assert {str(x.dtype) for x in jax.tree.leaves(mixed)} == {"bfloat16", "float32"}
    checkpoint.save(tmp_path / "a", mixed)
    assert_same(checkpoint.restore(tmp_path / "a"), mixed)
    assert checkpoint.read_config(tmp_path / "a") is None


def test_beside_an_optimizer_in_a_manager(trained, tmp_path):
    params, plan, adapter = trained
    tx = optax.adamw(1e-2)
    state = tx.init(adapter)

    @jax.jit
    def step(adapter, state):
        gradient = jax.grad(lambda a: lj.apply(forward, plan)(params, a, TOKENS).sum())(adapter)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    moved, state = step(adapter, state)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for number, each in ((1, adapter), (2, moved)):
            items = checkpoint.save_items(each, CONFIG)
            manager.save(number, args=ocp.args.Composite(**items, optimizer=ocp.args.StandardSave(state)))
        manager.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        again = manager.restore(2, args=ocp.args.Composite(optimizer=ocp.args.StandardRestore(abstract)))
    assert_same(again["optimizer"], state)
    assert_same(checkpoint.restore(tmp_path / "run" / "1"), adapter)
    assert_same(checkpoint.restore(tmp_path / "run" / "2"), moved)


def test_plain_orbax_restores_into_a_fresh_adapter(trained, tmp_path):
    params, plan, adapter = trained
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", adapter)
        checkpointer.wait_until_finished()
        fresh = jax.eval_shape(plan.init, jax.random.key(9), params)
        found = checkpointer.restore(tmp_path / "a", fresh)
    assert_same(found, adapter)


def test_restores_onto_a_mesh(trained, tmp_path):
    _, _, adapter = trained
    checkpoint.save(tmp_path / "a", adapter)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    def place(path, shape):
        seen.append((path, shape))
        return jax.sharding.NamedSharding(mesh, jax.P("x") if len(shape) == 2 else jax.P())

    found = checkpoint.restore(tmp_path / "a", sharding=place)
    assert_same(found, adapter)
    assert (("split", "lora_A", "kernel"), (6, 2)) in seen
    assert found["split"]["lora_A"]["kernel"].sharding.spec == jax.P("x")
    assert found["stack"]["lora_A"]["kernel"].sharding.spec == jax.P()


def test_refuses_to_overwrite(trained, tmp_path):
    _, _, adapter = trained
    checkpoint.save(tmp_path / "a", adapter)
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    with pytest.raises(ValueError, match="exists already.*overwrite=True"):
        checkpoint.save(tmp_path / "a", doubled)
    assert_same(checkpoint.restore(tmp_path / "a"), adapter)
    checkpoint.save(tmp_path / "a", doubled, overwrite=True)
    assert_same(checkpoint.restore(tmp_path / "a"), doubled)


def test_says_what_is_not_an_adapter(trained, tmp_path):
    _, _, adapter = trained
    with pytest.raises(ValueError, match="no adapter checkpoint.*holds nothing"):
        checkpoint.restore(tmp_path / "nowhere")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", adapter)
    with pytest.raises(ValueError, match="restored by orbax"):
        checkpoint.restore(tmp_path / "plain")
    with pytest.raises(TypeError, match="Adapter.from_leaves"):
        checkpoint.save(tmp_path / "b", adapter.to_dict())  # type: ignore[arg-type]


def test_refuses_a_newer_format(trained, tmp_path, monkeypatch):
    _, _, adapter = trained
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(tmp_path / "a", adapter)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        checkpoint.restore(tmp_path / "a")


def test_importing_it_does_not_import_orbax():
    code = (
        "import sys, lora_jax.checkpoint\n"
        "own = [m for m in sys.modules if m.startswith('orbax')]\n"
        "import flax.linen\n"  # flax itself may bring orbax; this module must not be what does
        "print(own)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
