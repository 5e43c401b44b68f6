"""Starts a compiled Triton kernel again on other tensors that lie as the first ones did.

Triton's launcher looks at its arguments each time: it asks the driver about every pointer, and encodes a tensor map for
every descriptor of tiles. To Python that takes longer than torch takes for five operations. Here the call that the
launcher makes in the end is recorded once, by its own code, and then repeated with other addresses. Tensor maps are
kept by the address, since all else about them is the same.
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any

logger = logging.getLogger(__name__)

Start = Callable[[dict[str, Any], int], None]
KEPT = 16384  # tensor maps, of half a kilobyte: addresses recur, those of weights and in a loop those of activations
_told: set[str] = set()


class Maps(dict[int, Any]):
    """Tensor maps of tensors that lie alike, with the same tiles, by the address. (A dict cannot be held weakly.)"""


# Many kinds of launches share them, and take them along when they are forgotten.
_maps: weakref.WeakValueDictionary[Hashable, Maps] = weakref.WeakValueDictionary()
_made = [0]  # since they were cleared


def recorded(
    compiled: Any,
    programs: int,
    arguments: list[Any],
    named: list[str | None],
    describe: dict[str, Callable[[Any], Any]],
) -> Start | None:
    """What starts `compiled` with tensors by their names on the current stream of a device, and calls no hooks.

    - `arguments`: those of the kernel, tensors or their descriptors where `named` has a name.
    - `describe`: makes the descriptor of a tensor, by the names of those that need one.

    None if this Triton's launcher is of an unknown kind, which the log tells once.
    """
    try:
        return _recorded(compiled, programs, arguments, named, describe)
    except Exception as error:  # of parts that no version promises; nothing was launched here
        told = f"{type(error).__name__}: {error}"
        if told not in _told:
            _told.add(told)
            logger.warning("launches take microseconds more: the launcher of this Triton is not known (%s)", told)
        return None


def _recorded(
    compiled: Any,
    programs: int,
    arguments: list[Any],
    named: list[str | None],
    describe: dict[str, Callable[[Any], Any]],
) -> Start:
    from torch._C import _cuda_getCurrentRawStream as stream_of
    from triton.backends.nvidia import driver

    launcher, signature = compiled.run, dict(compiled.src.signature.items())
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        raise ValueError("a kernel with memory or a sanitizer of its own")
    tiles = list(getattr(compiled.metadata, "tensordesc_meta", None) or [])
    names = [name for name in named if name is not None]
    described = [name for name in names if name in describe]
    if len(tiles) != len(described) or len(signature) != len(arguments):
        raise ValueError(f"{len(tiles)} and {len(signature)} for {len(described)} maps and {len(arguments)} arguments")
    start = launcher.launch
    if described:  # behind what encodes tensor maps
        start = dict(zip(start.__code__.co_freevars, start.__closure__, strict=True))["launcher"].cell_contents

    made: list[tuple[Any, ...]] = []
    stand_in, stream = copy.copy(launcher), object()
    # Each pointer's place is told by something of its own: one tensor may be two operands.
    pointer = {name: object() for name in names if name not in describe}
    arguments = [pointer.get(name or "", argument) for name, argument in zip(named, arguments, strict=True)]
    stand_in.launch = driver.wrap_handle_tensordesc(lambda *call: made.append(call), signature, tiles or None)
    stand_in(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    (call,) = made
    # Since Triton 3.7 the kernel's arguments are one; before they come after the others.
    apart = isinstance(call[-1], (list, tuple))
    head, tail = (list(call[:-1]), list(call[-1])) if apart else ([], list(call))
    stream_at = next(at for at, value in enumerate(head if apart else tail) if value is stream)
    map_at = [at for at, value in enumerate(tail) if _is_map(value)]
    pointers = [
        (next(at for at, value in enumerate(tail) if value is its_own), name) for name, its_own in pointer.items()
    ]
    # Triton 3.8 has a third parameter, which is nothing to this kind of GPU.
    more = (None,) * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2)
    given = dict(zip(named, arguments, strict=True))
    maps: list[tuple[int, str, Any, Maps]] = []
    for at, name, of in zip(map_at, described, tiles, strict=True):
        like = given[name]
        if not _is_map(driver.make_tensordesc_arg(like, of, *more)[0]):
            raise ValueError(f"`{name}`: no tensor map comes first")
        lying = tuple(like.shape), tuple(like.strides), repr(of)
        maps.append((at, name, of, _maps.setdefault(lying, Maps())))

    def again(operands: dict[str, Any], index: int, _alive: Any = compiled) -> None:
        values = tail.copy()
        for at, name in pointers:
            values[at] = operands[name].data_ptr()
        for at, name, of, known in maps:
            tensor = operands[name]
            address = tensor.data_ptr()
            found = known.get(address)
            if found is None:
                found = driver.make_tensordesc_arg(describe[name](tensor), of, *more)[0]
                _keep(known, address, found)
            values[at] = found
        if apart:
            others = head.copy()
            others[stream_at] = stream_of(index)
            start(*others, values)
        else:
            values[stream_at] = stream_of(index)
            start(*values)

    return again


def _is_map(value: Any) -> bool:
    return type(value).__name__ == "PyCUtensorMap"


def _keep(known: Maps, address: int, found: Any) -> None:
    _made[0] += 1
    if _made[0] > KEPT:
        for each in list(_maps.values()):
            each.clear()
        _made[0] = 1
    known[address] = found
