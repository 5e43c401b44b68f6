"""The adapter: a pytree of factors that knows what it adapts.

An `Adapter` reads like a nested dict (`adapter["layers_0"]["q_proj"]["lora_A"]["kernel"]`) and flattens like
one, so optax, orbax and `jax.tree` see a plain tree of arrays. Its `sites` (paths, roles, rank, alpha) are part
of the tree structure: they survive `jit`, `tree.map`, gradients and optimizer states, and are what lets
`merge(params, adapter)` work with nothing else in hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.sites import LORA_A, LORA_B, Site


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The tree of dicts with these leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


@jax.tree_util.register_pytree_with_keys_class
class Adapter(Mapping[str, Any]):
    """Trainable leaves of every adapted parameter, nested by path, plus their static `sites`.

    For a site with roles (lead, in, out) the leaves are `<module>/lora_A/<param>` of shape
    `(*lead, *in, rank)` and `<module>/lora_B/<param>` of shape `(*lead, rank, *out)`; with DoRA also
    `<module>/lora_magnitude_vector/<param>`, with `lora_bias` `<module>/lora_bias/<param>`, both of shape
    `(*lead, *out)`. Trained rows of a table are `<module>/trainable_tokens/<param>`. A site of kind `"full"` has one
    leaf at the parameter's own path.
    """

    def __init__(self, tree: Mapping[str, Any], sites: tuple[Site, ...]):
        self._tree = dict(tree)
        self.sites = tuple(sites)

    @classmethod
    def from_leaves(cls, leaves: Mapping[tuple[str, ...], Any], sites: tuple[Site, ...]) -> Adapter:
        """Builds the nested tree from `{path: leaf}`.

        **Raises:** `ValueError` if two sites need the same place in it.
        """
        check_places(sites)
        return cls(nested(leaves), sites)

    def __getitem__(self, key: str) -> Any:
        return self._tree[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)

    def __eq__(self, other: object) -> bool:
        """Identity: a mapping's own equality would compare arrays element by element."""
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Adapter({len(self.sites)} sites, {self.count():,} parameters)"

    def count(self) -> int:
        """Number of trainable parameters."""
        return sum(site.parameters for site in self.sites)

    def leaf(self, path: tuple[str, ...]) -> Any:
        """The leaf at `path`; a `KeyError` names the path that is missing."""
        return leaf_at(self._tree, path)

    def factors(self, site: Site) -> tuple[Any, Any]:
        """`(lora_A, lora_B)` of one site, as they multiply: the A of a group of inputs repeated for each of them."""
        a, b = self.leaf(site.leaf_path(LORA_A)), self.leaf(site.leaf_path(LORA_B))
        if site.group > 1:
            # QALoRA's mean over a group, times the number of groups.
            share = (site.fan_in // site.group) / site.group
            a = jnp.repeat(jnp.asarray(a), site.group, axis=-2) * jnp.asarray(share, a.dtype)
        return a, b

    def vectors(self, site: Site) -> dict[str, Any]:
        """What one site trains beside its factors, by name: DoRA's magnitude, a bias on B."""
        return {name: self.leaf(site.leaf_path(name)) for name in site.vectors}

    def to_dict(self) -> dict[str, Any]:
        """The leaves as plain nested dicts, without the sites."""
        return _plain(self._tree)

    def tree_flatten_with_keys(self):
        keys = tuple(sorted(self._tree))
        return [(jax.tree_util.DictKey(k), self._tree[k]) for k in keys], (keys, self.sites)

    def tree_flatten(self):
        keys = tuple(sorted(self._tree))
        return [self._tree[k] for k in keys], (keys, self.sites)

    @classmethod
    def tree_unflatten(cls, aux, children) -> Adapter:
        keys, sites = aux
        return cls(dict(zip(keys, children, strict=True)), sites)


def leaf_at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The leaf of a nested mapping at `path`."""
    node: Any = tree
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            raise KeyError(f"the adapter has no leaf `{'/'.join(path)}`")
        node = node[part]
    return node


def expected_leaves(sites: tuple[Site, ...]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """`{leaf path: shape}` of an adapter with these sites."""
    return {path: shape for site in sites for path, shape in site.leaves.items()}


def check_places(sites: tuple[Site, ...]) -> None:
    """Raises unless every leaf of an adapter with these sites has a place of its own in the tree."""
    owners: dict[tuple[str, ...], Site] = {}
    for site in sites:
        for path in site.leaves:
            _refuse_clash(owners.setdefault(path, site), site, path)
    for path, site in owners.items():
        for end in range(1, len(path)):
            _refuse_clash(owners.get(path[:end], site), site, path[:end])


def _refuse_clash(one: Site, other: Site, path: tuple[str, ...]) -> None:
    if one is not other:
        raise ValueError(
            f"`{one.name}` and `{other.name}` would both be stored at {_slash(path)} of the adapter: leave one out "
            "with `exclude_modules` or of `modules_to_save`, or rename the parameter."
        )


def as_adapter(tree: Any, sites: tuple[Site, ...]) -> Adapter:
    """Checks a tree of leaves (an `Adapter` or nested mappings) against `sites`.

    An `Adapter` has to adapt the same parameters, and keeps sites of its own: its rank, alpha and roles are
    what its factors mean. Bare leaves take `sites`.

    **Raises:** `ValueError` naming every parameter or leaf that is missing, unexpected or of the wrong shape;
    `TypeError` for leaves that are no floating-point arrays.
    """
    problems = []
    if isinstance(tree, Adapter):
        planned, own = ({site.path: site for site in group} for group in (sites, tree.sites))
        problems += [f"`{planned[p].name}` is not in the adapter" for p in planned if p not in own]
        problems += [f"`{own[p].name}` is not in the plan" for p in own if p not in planned]
        problems += [
            f"`{own[p].name}` is for shape {own[p].shape}, planned {planned[p].shape}"
            for p in own
            if p in planned and (own[p].shape, own[p].is_full) != (planned[p].shape, planned[p].is_full)
        ]
        sites, tree = tree.sites, tree._tree
    expected = expected_leaves(sites)
    found = dict(_leaves(tree))
    if not problems:
        problems += [f"missing {_slash(p)} {expected[p]}" for p in expected if p not in found]
        problems += [f"unexpected {_slash(p)}" for p in found if p not in expected]
        problems += [
            f"{_slash(p)} has shape {tuple(found[p].shape)}, expected {expected[p]}"
            for p in expected
            if p in found and hasattr(found[p], "shape") and tuple(found[p].shape) != expected[p]
        ]
    if problems:
        raise ValueError(
            "the adapter does not fit the plan: " + "; ".join(problems) + ". Use the adapter that "
            "`plan.init` of this plan returns, or plan again with the config the adapter was made with."
        )
    for path, leaf in found.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{_slash(path)} is {dtype or type(leaf).__name__}, not a floating-point array.")
    return Adapter.from_leaves({p: found[p] for p in expected}, sites)


def _leaves(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping):
        for key in tree:
            yield from _leaves(tree[key], (*prefix, str(key)))
    else:
        yield prefix, tree


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _slash(path: tuple[str, ...]) -> str:
    return "/".join(path)
