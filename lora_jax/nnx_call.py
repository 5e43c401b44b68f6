"""One call of an nnx module as a pure function of its parameters, and its side effects put back afterwards.

A call may advance counters and statistics, fill caches, count in plain attributes, or use random streams handed to
it as arguments. The function below works on copies inside the trace and reports what became different; `put_back`
repeats that on the originals. State that stayed the same is not written, so that a module in evaluation mode can be
used inside `jax.jit`, `jax.vmap` or `jax.grad` that it did not enter as an argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

# What is adapted. A base's own `LoRAParam`s are not: see `lora_jax.nnx.adapt`.
BASE_PARAMS = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


@dataclass(frozen=True)
class Item:
    """A step of a path by index rather than by attribute."""

    index: Any


Step = str | Item


def walk(node: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        node = node[step.index] if isinstance(step, Item) else getattr(node, step)
    return node


class _Holder(nnx.Module):
    """Makes a bare variable a graph node with a path."""

    def __init__(self, value: nnx.Variable):
        self.value = value


def is_graph_node(x: Any) -> bool:
    return isinstance(x, nnx.Variable | nnx.Module | nnx.Rngs | nnx.RngStream)


@dataclass
class Call:
    """One call, taken apart: `call.fn(params, state, inputs)` is pure; `call.put_back(changes)` is the rest."""

    base: nnx.Module
    path: tuple[Step, ...]
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    nodes: list[Any] = field(default_factory=list)
    changed: list[list[Any]] = field(default_factory=list)
    plain: list[tuple[Any, str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        leaves, self._tree = jax.tree.flatten((self.args, self.kwargs), is_leaf=is_graph_node)
        # The base first; then each different node among the arguments.
        self.nodes = [self.base]
        self._places: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            if is_graph_node(leaf):
                known = [n for n, node in enumerate(self.nodes) if node is leaf]
                self._places[i] = known[0] if known else len(self.nodes)
                if not known:
                    self.nodes.append(leaf)
        self.inputs = [None if i in self._places else leaf for i, leaf in enumerate(leaves)]
        self._graphdef, self.params, rest = nnx.split(self.base, BASE_PARAMS, ...)
        self.nodes = [_Holder(node) if isinstance(node, nnx.Variable) else node for node in self.nodes]
        others = [nnx.split(node) for node in self.nodes[1:]]
        self._others = [graphdef for graphdef, _ in others]
        self.state = [rest, *(state for _, state in others)]

    def fn(self, params: Any, state: list[Any], inputs: list[Any]) -> tuple[Any, list[list[Any]]]:
        """The call's result, and for each node the variables that became different, at `self.changed`."""
        before = [_values(s) for s in state]
        model = nnx.merge(self._graphdef, params, state[0])
        nodes = [model, *(nnx.merge(g, s) for g, s in zip(self._others, state[1:], strict=True))]
        plain = _plain_attributes(model)
        given = [node.value if isinstance(node, _Holder) else node for node in nodes]
        leaves = [given[self._places[i]] if i in self._places else x for i, x in enumerate(inputs)]
        args, kwargs = jax.tree.unflatten(self._tree, leaves)
        target = walk(model, self.path)
        function: Callable[..., Any] = target if self.method == "__call__" else getattr(target, self.method)
        out = function(*args, **kwargs)
        self.plain = [
            (path, name, value)
            for (path, name), value in _plain_attributes(model).items()
            if (path, name) not in plain or plain[path, name] != value
        ]
        after = [nnx.split(model, BASE_PARAMS, ...)[2], *(nnx.state(node) for node in nodes[1:])]
        changes = [
            {path: variable for path, variable in nnx.to_flat_state(now) if old.get(path) is not _raw(variable)}
            for now, old in zip(after, before, strict=True)
        ]
        self.changed = [list(change) for change in changes]
        return out, [list(change.values()) for change in changes]

    def put_back(self, changes: list[list[Any]]) -> None:
        """Repeats the call's side effects on the original nodes."""
        for node, paths, variables in zip(self.nodes, self.changed, changes, strict=True):
            changed = dict(zip(paths, variables, strict=True))
            known = dict(nnx.to_flat_state(nnx.state(node)))
            nnx.update(node, nnx.from_flat_state([(p, v) for p, v in changed.items() if p in known]))
            for path, variable in changed.items():
                if path not in known:
                    _attach(node, path, variable)
        for path, name, value in self.plain:
            setattr(walk(self.base, path), name, value)


def _values(state: Any) -> dict[Any, Any]:
    return {path: _raw(variable) for path, variable in nnx.to_flat_state(state)}


def _raw(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _attach(node: Any, path: tuple[Any, ...], variable: Any) -> None:
    """Adds a variable that the call created (a cache, say) to the original node."""
    *parents, name = path
    try:
        owner = node
        for part in parents:
            owner = owner[part] if isinstance(part, int) else getattr(owner, part)
    except (AttributeError, KeyError, IndexError):
        raise ValueError(
            f"the call created `{'.'.join(map(str, path))}` in a new submodule; create it on the base before adapting."
        ) from None
    setattr(owner, name, variable)


def _plain_attributes(model: nnx.Module) -> dict[tuple[Any, str], Any]:
    """Python values stored on the modules of a model: flags, counters, names."""
    found: dict[tuple[Any, str], Any] = {}
    for path, module in itertools.chain([((), model)], nnx.iter_modules(model)):
        steps = tuple(Item(p) if isinstance(p, int) else p for p in path)
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, bool | int | float | str | None):
                found[steps, name] = value
    return found
