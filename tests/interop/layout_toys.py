"""Layers in their Flax and their PyTorch layouts, side by side, with the naming that leads from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


from lora_torch import Naming, Rule, to_torch_state_dict  # noqa: E402


@dataclass(frozen=True)
class Toy:
    """`fn(params, x)` and a torch module that computes the same from `naming`'s tensors."""

    fn: Callable[[Any, Any], Any]
    shapes: Mapping[str, Any]
    torch_model: Callable[[], Any]
    x: np.ndarray
    naming: Naming
    config: Mapping[str, Any]
    # PEFT's settings for the way back; None where PEFT cannot express what is needed.
    peft: Mapping[str, Any] = field(default_factory=dict)
    to_torch: Callable[[np.ndarray], Any] = lambda x: torch.tensor(x)
    from_torch: Callable[[Any], np.ndarray] = lambda y: y.numpy()
    options: Mapping[str, Any] = field(default_factory=dict)


def numbers(shapes: Any, seed: int = 5) -> Any:
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=s) * 0.4, jnp.float32) for s in leaves])


def x_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


class Chain(torch.nn.Module):
    """A module whose children's names are given, called by `forward`."""

    def __init__(self, children: Mapping[str, Any], run: Callable[[Any, Any], Any]):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.run = run

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def linear(i: int, o: int) -> Any:
    return torch.nn.Linear(i, o, bias=False)


# Stacked layers --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x + jnp.tanh(nn.Dense(6, use_bias=False, name="up")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(4, use_bias=False, name="head")(x)


def scanned() -> Toy:
    def run(m: Any, x: Any) -> Any:
        for layer in m.layers:
            x = x + torch.tanh(layer.up(x))
        return m.head(x)

    return Toy(
        lambda p, x: Scanned().apply({"params": p}, x),
        {"layers": {"up": {"kernel": (3, 6, 6)}}, "head": {"kernel": (6, 4)}},
        lambda: Chain(
            {
                "layers": torch.nn.ModuleList(torch.nn.ModuleDict({"up": linear(6, 6)}) for _ in range(3)),
                "head": linear(6, 4),
            },
            run,
        ),
        x_of(5, 6),
        Naming(preset="linen"),  # the stack is read from the site's roles
        dict(rank=2, alpha=3, target_modules=["up", "head"]),
        dict(r=2, target_modules=["up", "head"], rank_pattern={"layers.1.up": 3}, alpha_pattern={"layers.2.up": 5}),
    )


# Fused projections -----------------------------------------------------------------------------------------------


def key_value(m: Any, x: Any) -> Any:
    return m.k(x) * torch.sigmoid(m.v(x))


KV = Rule("kv.w", to=("k.weight", "v.weight"), layout="s n d h -> (n h) d")


def fused_indexed() -> Toy:
    """One A for each of the two: the pair is indexed away before it is used."""

    def fn(p: Any, x: Any) -> Any:
        w = p["kv"]["w"]
        k, v = (jnp.einsum("bd,ndh->bnh", x, w[i]) for i in range(2))
        return (k * jax.nn.sigmoid(v)).reshape(x.shape[0], -1)

    return Toy(
        fn,
        {"kv": {"w": (2, 3, 5, 4)}},
        lambda: Chain({"k": linear(5, 12), "v": linear(5, 12)}, key_value),
        x_of(7, 5),
        Naming(rules=[KV]),
        dict(rank=2, alpha=3, target_modules=["kv"]),
        dict(r=2, target_modules=["k", "v"], rank_pattern={"v": 3}, alpha_pattern={"k": 7}),
    )


def fused_together() -> Toy:
    """One A for both: the pair is an output axis. From PEFT come two, so the rank doubles."""

    def fn(p: Any, x: Any) -> Any:
        k, v = jnp.einsum("bd,sndh->sbnh", x, p["kv"]["w"])
        return (k * jax.nn.sigmoid(v)).reshape(x.shape[0], -1)

    return Toy(
        fn,
        {"kv": {"w": (2, 3, 5, 4)}},
        lambda: Chain({"k": linear(5, 12), "v": linear(5, 12)}, key_value),
        x_of(7, 5),
        Naming(rules=[KV]),
        dict(rank=2, alpha=3, target_modules=["kv"]),
        dict(r=2, target_modules=["k", "v"], alpha_pattern={"v": 3}),
    )


def heads() -> Toy:
    """DenseGeneral with heads first in, first out, and last out, in a non-trivial order on the torch side."""

    def fn(p: Any, x: Any) -> Any:
        y = jnp.einsum("bd,dnh->bnh", x, p["q"]["kernel"])
        return jnp.einsum("bnh,nhd->bd", jnp.tanh(y), p["o"]["kernel"])

    def run(m: Any, x: Any) -> Any:
        y = torch.tanh(m.q(x)).reshape(-1, 4, 3).transpose(1, 2).reshape(-1, 12)  # torch keeps (h n)
        return m.o(y)

    return Toy(
        fn,
        {"q": {"kernel": (5, 3, 4)}, "o": {"kernel": (3, 4, 5)}},
        lambda: Chain({"q": linear(5, 12), "o": linear(12, 5)}, run),
        x_of(7, 5),
        Naming(rules=[Rule("q.kernel", layout="d n h -> (h n) d"), Rule("o.kernel", layout="heads_out")]),
        dict(rank=2, alpha=3, target_modules=["q", "o"]),
        dict(r=2, target_modules=["q", "o"]),
    )


# Convolutions ----------------------------------------------------------------------------------------------------


def conv(dims: int, groups: int = 1, channels: int = 4, features: int = 6) -> Toy:
    window = (3, 2, 2)[:dims]
    letters = "DHW"[-dims:]
    layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def fn(p: Any, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x,
            p["conv"]["kernel"],
            (2, 1, 1)[:dims],
            [(1, 1)] * dims,
            dimension_numbers=layout,
            feature_group_count=groups,
        )
        return jnp.tanh(y)

    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims]
    return Toy(
        fn,
        {"conv": {"kernel": (*window, channels // groups, features)}},
        lambda: Chain(
            {"conv": kind(channels, features, window, (2, 1, 1)[:dims], 1, groups=groups, bias=False)},
            lambda m, x: torch.tanh(m.conv(x)),
        ),
        x_of(2, *(6, 5, 4)[:dims], channels),
        Naming(layouts={"conv.kernel": "conv"}),
        dict(rank=2, alpha=3, target_modules=["conv"]),
        # The A of a grouped convolution in PEFT sees every channel: no grouped kernel does what it does.
        None if groups > 1 else dict(r=2, target_modules=["conv"]),  # type: ignore[arg-type]
        to_torch=lambda x: torch.tensor(np.moveaxis(x, -1, 1).copy()),
        from_torch=lambda y: np.moveaxis(y.numpy(), 1, -1),
    )


# Embeddings, experts ---------------------------------------------------------------------------------------------


def embedding() -> Toy:
    return Toy(
        lambda p, x: jnp.tanh(p["embed"]["embedding"][x.astype(jnp.int32)]) @ p["out"]["kernel"],
        {"embed": {"embedding": (9, 5)}, "out": {"kernel": (5, 3)}},
        lambda: Chain(
            {"embed": torch.nn.Embedding(9, 5), "out": linear(5, 3)}, lambda m, x: m.out(torch.tanh(m.embed(x)))
        ),
        np.array([[0.0, 8, 3], [3, 1, 2]], np.float32),
        Naming(preset="linen"),
        dict(rank=2, alpha=3, target_modules=["embed", "out"], use_rslora=True),
        dict(r=2, target_modules=["embed", "out"], use_rslora=True),
        to_torch=lambda x: torch.tensor(x.astype(np.int64)),
    )


def experts_fn(p: Any, x: Any) -> Any:
    mlp = p["mlp"]["experts"]
    y = jnp.tanh(jnp.einsum("ebd,edf->ebf", x, mlp["gate_up_proj"]))
    return jnp.einsum("ebf,efd->ebd", y, mlp["down_proj"])


def experts_one_by_one() -> Toy:
    def run(m: Any, x: Any) -> Any:
        return torch.stack([e.down_proj(torch.tanh(e.gate_up_proj(y))) for e, y in zip(m.mlp.experts, x, strict=True)])

    def make() -> Any:
        one = [torch.nn.ModuleDict({"gate_up_proj": linear(5, 6), "down_proj": linear(6, 5)}) for _ in range(3)]
        return Chain({"mlp": torch.nn.ModuleDict({"experts": torch.nn.ModuleList(one)})}, run)

    return Toy(
        experts_fn,
        {"mlp": {"experts": {"gate_up_proj": (3, 5, 6), "down_proj": (3, 6, 5)}}},
        make,
        x_of(3, 7, 5),
        Naming(rules=[Rule("mlp.experts.*", to="mlp.experts.{e}.*.weight", layout="e d f -> f d")]),
        dict(rank=2, alpha=3, target_modules=["experts.gate_up_proj", "experts.down_proj"]),
        dict(r=2, target_modules=["gate_up_proj", "down_proj"]),
    )


class Experts(torch.nn.Module):
    """Three-dimensional parameters, as transformers' experts: (E, out, in), or (E, in, out) if `is_transposed`."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        up, down = ((3, 5, 6), (3, 6, 5)) if transposed else ((3, 6, 5), (3, 5, 6))
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(up))
        self.down_proj = torch.nn.Parameter(torch.zeros(down))

    def forward(self, x: Any) -> Any:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return torch.tanh(x @ up) @ down


def experts_stacked(transposed: bool) -> Toy:
    def make() -> Any:
        return Chain({"mlp": torch.nn.ModuleDict({"experts": Experts(transposed)})}, lambda m, x: m.mlp.experts(x))

    return Toy(
        experts_fn,
        {"mlp": {"experts": {"gate_up_proj": (3, 5, 6), "down_proj": (3, 6, 5)}}},
        make,
        x_of(3, 7, 5),
        Naming(layouts={"mlp.experts.*": "same" if transposed else "e d f -> e f d"}),
        dict(
            rank=2, alpha=3, target_modules=["experts.gate_up_proj", "experts.down_proj"], rank_pattern={"down_proj": 4}
        ),
        dict(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    )


TOYS: dict[str, Callable[[], Toy]] = {
    "scanned layers": scanned,
    "fused, indexed": fused_indexed,
    "fused, one product": fused_together,
    "heads": heads,
    "conv 1d": lambda: conv(1),
    "conv 2d": lambda: conv(2),
    "conv 3d": lambda: conv(3),
    "conv 2d, groups": lambda: conv(2, groups=2),
    "conv 2d, depthwise": lambda: conv(2, groups=4, features=8),
    "embedding": embedding,
    "experts, modules": experts_one_by_one,
    "experts, (E, out, in)": lambda: experts_stacked(False),
    "experts, (E, in, out)": lambda: experts_stacked(True),
}


def torch_base(toy: Toy, params: Any) -> Any:
    n = toy.naming
    model = toy.torch_model()
    state = to_torch_state_dict(
        params, preset=n.preset, names=n.names, layouts=n.layouts, rules=n.rules, stacks=stacks_of(toy), kind="torch"
    )
    model.load_state_dict({k: v.clone() for k, v in state.items()})
    return model


def stacks_of(toy: Toy) -> Sequence[str]:
    return ("layers",) if "layers" in toy.shapes else ()


def outputs(toy: Toy, model: Any) -> np.ndarray:
    with torch.no_grad():
        return toy.from_torch(model.eval()(toy.to_torch(toy.x)))
