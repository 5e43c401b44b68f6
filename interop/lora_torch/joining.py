"""Classes that put one of ours before a module's own, so that the module stays what it was and is ours as well."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T", bound=nn.Module)


@functools.cache
def joined(first: type[T], base: type[nn.Module]) -> type[T]:
    """A class that is both. Methods of `first` go before those of `base`, to which its `super()` leads.

    `first` itself, if it is a kind of `base` already. Instances can be pickled and copied.
    """
    if issubclass(first, base):
        return first
    name = f"{base.__name__}_{first.__name__}"
    made: Any = type(name, (first, base), {"__reduce_ex__": _reduce, "_joined_from": (first, base)})
    return made


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle finds classes by name in modules, and no module holds this one: so by what it was made of."""
    return _empty, self._joined_from, self.__getstate__()


def _empty(first: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    made = joined(first, base)
    return made.__new__(made)
