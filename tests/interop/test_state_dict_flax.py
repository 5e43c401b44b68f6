"""Flax's own modules against their PyTorch counterparts: scan stacks, attention, convolutions, NNX states."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

torch = pytest.importorskip("torch")

from lora_torch import Rule, StateDictError, from_torch_state_dict, to_torch_state_dict  # noqa: E402
from lora_torch.arrays import same_bits  # noqa: E402


def randomised(tree: Any, seed: int = 0) -> Any:
    """The same tree with random values; vectors positive, so that they also serve as variances."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        values = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(0.5 + abs(values) if leaf.ndim == 1 else 0.3 * values)

    return jax.tree.map(draw, tree)


def gap(module: Any, state: dict[str, Any], inputs: np.ndarray, want: Any) -> float:
    """Largest difference of the torch module's output, relative to the largest output, after a strict load."""
    module.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in state.items()}, strict=True)
    with torch.no_grad():
        got = module.eval()(torch.tensor(inputs)).numpy()
    want = np.asarray(want)
    assert got.shape == want.shape
    return float(np.max(abs(got - want)) / np.max(abs(want)))


def returns_exactly(state: dict[str, Any], tree: Any, **options: Any) -> bool:
    back = from_torch_state_dict(state, jax.eval_shape(lambda: tree), **options)
    same = jax.tree.leaves(jax.tree.map(same_bits, tree, back))
    return jax.tree.structure(back) == jax.tree.structure(tree) and all(same)


# --- a scanned stack of layers ---------------------------------------------------------------------------------------


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = nn.Dense(self.width, name="up")(nn.LayerNorm(name="norm", epsilon=1e-5)(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.tanh(h)), None


class Stack(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scanned = nn.scan(nn.remat(Block), variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        x, _ = scanned(x.shape[-1], name="layers")(x, None)
        return nn.Dense(5, name="head_0")(x)


class TorchBlock(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def forward(self, x: Any) -> Any:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class TorchStack(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = torch.nn.ModuleList([TorchBlock(width) for _ in range(3)])
        self.head = torch.nn.ModuleList([torch.nn.Linear(width, 5)])

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head[0](x)


@pytest.mark.parametrize("axis", [0, 1])
def test_scan_stack(axis: int) -> None:
    x = np.random.default_rng(1).normal(size=(2, 4, 8)).astype(np.float32)
    model = Stack(axis)
    params = randomised(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    options: dict[str, Any] = dict(preset="linen", stacks=("layers",) if axis == 0 else {"layers": 1})
    want = model.apply({"params": params}, x)
    state = to_torch_state_dict(params, **options)
    twin = TorchStack(8)
    assert set(state) == set(twin.state_dict())
    assert gap(twin, state, x, want) <= 1e-5
    assert returns_exactly(state, params, **options)
    # Two layers exchanged, or one square kernel not transposed, fit every shape but not the output.
    for leaf in ("up.weight", "down.weight"):
        one, other = f"layers.0.{leaf}", f"layers.1.{leaf}"
        assert gap(twin, {**state, one: state[other], other: state[one]}, x, want) > 1e-3
        assert gap(twin, {**state, one: state[one].T}, x, want) > 1e-3


def test_nested_stacks_and_a_forgotten_one() -> None:
    tree = {"stages": {"layers": {"w": {"kernel": np.arange(2 * 3 * 4 * 5.0, dtype=np.float32).reshape(2, 3, 4, 5)}}}}
    stacks = ("stages", "stages.layers")
    state = to_torch_state_dict(tree, preset="linen", stacks=stacks)
    assert set(state) == {f"stages.{i}.layers.{j}.w.weight" for i in range(2) for j in range(3)}
    kernel = tree["stages"]["layers"]["w"]["kernel"]
    assert np.array_equal(state["stages.1.layers.2.w.weight"], kernel[1, 2].T)
    assert returns_exactly(state, tree, preset="linen", stacks=stacks)
    with pytest.raises(StateDictError, match=r"stages.layers.w.kernel \(2, 3, 4, 5\)|missing"):
        from_torch_state_dict(state, tree, preset="linen", stacks=("stages",))
    # The kernel of an unstated stack of Dense layers is no DenseGeneral: only the caller can say.
    with pytest.raises(StateDictError, match=r"layers.w.kernel \(3, 4, 5\) could be 'd n h -> \(n h\) d'"):
        to_torch_state_dict({"layers": {"w": {"kernel": kernel[0]}}}, preset="linen")


# --- attention -------------------------------------------------------------------------------------------------------


def test_attention_becomes_torch_multihead_attention() -> None:
    """Separate DenseGeneral kernels (D, N, H) are the three parts of one in_proj_weight (3D, D)."""
    rules = [
        *(Rule(f"{name}.kernel", to="in_proj_weight", part=n) for n, name in enumerate(("query", "key", "value"))),
        *(Rule(f"{name}.bias", to="in_proj_bias", part=n) for n, name in enumerate(("query", "key", "value"))),
        Rule("out.**", to="out_proj.**"),
    ]
    x = np.random.default_rng(1).normal(size=(2, 5, 12)).astype(np.float32)
    model = nn.MultiHeadDotProductAttention(num_heads=3)
    params = randomised(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    assert params["query"]["kernel"].shape == (12, 3, 4)

    class SelfAttention(torch.nn.MultiheadAttention):
        def forward(self, x: Any) -> Any:  # type: ignore[override]
            return super().forward(x, x, x, need_weights=False)[0]

    twin = SelfAttention(12, 3, batch_first=True)
    state = to_torch_state_dict(params, preset="linen", rules=rules, like=twin.state_dict())
    assert {name: value.shape for name, value in state.items()} == {
        "in_proj_weight": (36, 12),
        "in_proj_bias": (36,),
        "out_proj.weight": (12, 12),
        "out_proj.bias": (12,),
    }
    want = model.apply({"params": params}, x)
    assert gap(twin, state, x, want) <= 1e-5
    assert returns_exactly(state, params, preset="linen", rules=rules)
    swapped = np.concatenate(
        [state["in_proj_weight"][12:24], state["in_proj_weight"][:12], state["in_proj_weight"][24:]]
    )
    assert gap(twin, {**state, "in_proj_weight": swapped}, x, want) > 1e-3
    assert gap(twin, {**state, "out_proj.weight": state["out_proj.weight"].T}, x, want) > 1e-3
    with pytest.raises(StateDictError, match=r"in_proj_weight: parts \[0, 2\] given"):
        to_torch_state_dict(params, preset="linen", rules=[rule for rule in rules if rule.part != 1])


class Heads(nnx.Module):
    """Attention without its softmax, under names of its own: no rule knows them."""

    def __init__(self, rngs: nnx.Rngs):
        self.q = nnx.LinearGeneral(12, (3, 4), rngs=rngs)
        self.o = nnx.LinearGeneral((3, 4), 12, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.o(jnp.tanh(self.q(x)))


def test_dense_general_layouts_are_stated_or_proved_by_shapes() -> None:
    x = np.random.default_rng(1).normal(size=(2, 12)).astype(np.float32)
    model = Heads(nnx.Rngs(0))
    nnx.update(model, randomised(nnx.state(model)))
    state = nnx.state(model)

    class Twin(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

        def forward(self, x: Any) -> Any:
            return self.o(torch.tanh(self.q(x)))

    with pytest.raises(StateDictError, match="layout unknown") as caught:
        to_torch_state_dict(state, preset="nnx")
    assert set(caught.value.ambiguous) == {"q.kernel", "q.bias", "o.kernel"}
    twin = Twin()
    proved = to_torch_state_dict(state, preset="nnx", like=twin.state_dict())
    layouts = {"q.kernel": "heads_in", "q.bias": "heads_bias", "o.kernel": "heads_out"}
    stated = to_torch_state_dict(state, preset="nnx", layouts=layouts)
    assert all(same_bits(proved[name], stated[name]) for name in stated)
    want = model(x)
    assert gap(twin, proved, x, want) <= 1e-5
    assert gap(twin, to_torch_state_dict(state, layouts={**layouts, "q.kernel": "d n h -> (h n) d"}), x, want) > 1e-3
    assert returns_exactly(proved, state, preset="nnx")


# --- convolutions and batch norm -------------------------------------------------------------------------------------


class Convs(nn.Module):
    rank: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (3,) * self.rank
        x = nn.Conv(8, size, strides=2, padding=1, name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn")(x)
        x = nn.Conv(8, size, padding=1, feature_group_count=4, name="grouped")(nn.relu(x))
        return nn.ConvTranspose(6, size, strides=(2,) * self.rank, padding="VALID")(x)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_and_batch_norm(rank: int) -> None:
    x = np.random.default_rng(1).normal(size=(2, *(5, 6, 7)[:rank], 4)).astype(np.float32)
    model = Convs(rank)
    variables = randomised(jax.eval_shape(model.init, jax.random.key(0), x))
    conv = getattr(torch.nn, f"Conv{rank}d")

    class Twin(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(4, 8, 3, stride=2, padding=1)
            self.bn = getattr(torch.nn, f"BatchNorm{rank}d")(8)
            self.grouped = conv(8, 8, 3, padding=1, groups=4)
            self.ConvTranspose = torch.nn.ModuleList([getattr(torch.nn, f"ConvTranspose{rank}d")(8, 6, 3, stride=2)])

        def forward(self, x: Any) -> Any:
            x = self.grouped(torch.relu(self.bn(self.conv(x.movedim(-1, 1)))))
            return self.ConvTranspose[0](x).movedim(1, -1)

    options: dict[str, Any] = dict(preset="linen")
    if rank == 1:  # (k, in, out) has as many axes as a DenseGeneral kernel
        options["layouts"] = {"conv.kernel": "conv", "grouped.kernel": "conv"}
    twin = Twin()
    state = to_torch_state_dict(variables, **options, like=twin.state_dict())
    want = model.apply(variables, x)
    assert gap(twin, state, x, want) <= 1e-5
    assert returns_exactly(state, variables, **options)
    assert returns_exactly(twin.state_dict(), variables, **options)  # with num_batches_tracked, which Flax lacks
    mean, var = "bn.running_mean", "bn.running_var"
    faults = [
        {mean: state[var], var: state[mean]},
        {"grouped.weight": np.flip(state["grouped.weight"], -1).copy()},
        {"ConvTranspose.0.weight": np.flip(state["ConvTranspose.0.weight"], -1).copy()},
    ]
    for fault in faults:
        assert gap(twin, {**state, **fault}, x, want) > 1e-3


# --- NNX states ------------------------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.bn_1 = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.gating = nnx.Param(jnp.zeros((2, 6, 8)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = jnp.tanh(block(x))
        x = self.bn_1(x)
        gate, up = jnp.einsum("btd,sdf->sbtf", x, self.gating[...])
        return gate * up


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 6)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(2)])
        self.bn_1 = torch.nn.BatchNorm1d(6)
        self.gate_proj, self.up_proj = (torch.nn.Linear(6, 8, bias=False) for _ in range(2))

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = torch.tanh(block(x))
        x = self.bn_1(x.movedim(-1, 1)).movedim(1, -1)
        return self.gate_proj(x) * self.up_proj(x)


@pytest.mark.parametrize("form", ["state", "pure_dict", "frozen"])
def test_nnx_state_and_its_dicts(form: str) -> None:
    model = Net(nnx.Rngs(0))
    nnx.update(model, randomised(nnx.state(model)))
    tree: Any = nnx.state(model)
    if form != "state":
        tree = nnx.to_pure_dict(tree)
    if form == "frozen":
        tree = freeze(jax.tree.map(np.asarray, tree))
    split = Rule("gating", to=("gate_proj.weight", "up_proj.weight"), layout="s d f -> f d")
    tokens = np.random.default_rng(1).integers(0, 7, (2, 3))
    state = to_torch_state_dict(tree, preset="nnx", rules=[split])
    twin = TorchNet()
    want = model(jnp.asarray(tokens))
    assert gap(twin, state, tokens, want) <= 1e-5
    assert returns_exactly(twin.state_dict(), tree, preset="nnx", rules=[split])
    assert gap(twin, {**state, "blocks.0.weight": state["blocks.1.weight"]}, tokens, want) > 1e-3
    assert gap(twin, {**state, "blocks.0.weight": state["blocks.0.weight"].T}, tokens, want) > 1e-3


def test_result_keeps_boxes_and_variables() -> None:
    """Partitioned linen params and nnx variables come back as such, with their metadata."""

    def initialised(shape: tuple[int, int]) -> Any:
        return nn.with_partitioning(lambda *_: jnp.ones(shape), ("data", None))(jax.random.key(0))

    boxed = {"dense": {"kernel": initialised((2, 3))}}
    back = from_torch_state_dict({"dense.weight": np.zeros((3, 2), np.float32)}, boxed, preset="linen")
    assert isinstance(back["dense"]["kernel"], nn.Partitioned) and back["dense"]["kernel"].names == ("data", None)
    assert np.array_equal(back["dense"]["kernel"].value, np.zeros((2, 3)))
    linear = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    state = from_torch_state_dict({"weight": np.zeros((3, 2), np.float32)}, nnx.state(linear), preset="nnx")
    assert isinstance(state["kernel"], nnx.Param)


# --- splits ----------------------------------------------------------------------------------------------------------


def test_fused_key_value_and_experts_split() -> None:
    rng = np.random.default_rng(0)
    kv = rng.normal(size=(2, 3, 8, 4)).astype(np.float32)  # (k or v, heads, features, head size)
    experts = rng.normal(size=(5, 8, 6)).astype(np.float32)  # (experts, in, out)
    tree = {"layers": {"0": {"kv": {"w": kv}, "moe": {"up": experts}}}}
    rules = [
        Rule("**.kv.w", to=("**.k_proj.weight", "**.v_proj.weight"), layout="s k d h -> (k h) d"),
        Rule("**.moe.up", to="**.moe.experts.{e}.up.weight", layout="e d f -> f d"),
    ]
    state = to_torch_state_dict(tree, rules=rules)
    x = rng.normal(size=(8,)).astype(np.float32)
    for n, name in enumerate(("k_proj", "v_proj")):
        want = np.einsum("d,kdh->kh", x, kv[n]).reshape(-1)
        np.testing.assert_allclose(state[f"layers.0.{name}.weight"] @ x, want, rtol=1e-5, atol=1e-5)
    for e in range(5):
        assert np.array_equal(state[f"layers.0.moe.experts.{e}.up.weight"], experts[e].T)
    assert all(value.flags.c_contiguous for value in state.values())
    assert returns_exactly(state, tree, rules=rules)
