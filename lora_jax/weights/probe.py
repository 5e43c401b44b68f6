"""The planning kind: a parameter without factors that records how the model uses it.

An abstract run of the interpreter over probes is how the library learns which axes of a weight are contracted,
kept, batched or indexed: (48, 16) may be GPT-2's (out, in), (8, 2048, 256) heads first, (2, 4, 512, 64) a fused
pair. Shapes and names cannot tell; the trace can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from lora_jax import _compat
from lora_jax.sites import Atom
from lora_jax.weights.lookup import Picks, batch_atoms, rest_of_gather
from lora_jax.weights.virtual import Dims, DotGeneral, Virtual

# Not add or sub: a bias is added to activations, and is no weight.
ELEMENTWISE = frozenset(
    "mul div tanh sign round clamp abs exp max min select_n integer_pow sqrt rsqrt logistic convert_element_type "
    "floor ceil log square pow reduce_precision".split()
)


@dataclass(frozen=True)
class Use:
    """One place where a parameter is used: the operation and a role letter for each atom."""

    op: str
    roles: tuple[tuple[Atom, str], ...]
    kernel_spec: tuple[int, ...] | None = None
    groups: int = 1


@dataclass(frozen=True)
class Dense:
    """One place where a parameter has to be formed in full, and the primitive that asked for it.

    `lookup`: only what an array of indices picked, which is formed by the lookup itself if the parameter is a table.
    """

    primitive: str
    shape: tuple[int, ...]
    lookup: bool = False


@dataclass(frozen=True)
class Drop:
    """One product whose input dropout acts on; `picked` are the weight's axes that indices picked from before it."""

    op: str
    roles: tuple[tuple[Atom, str], ...]
    picked: frozenset[int]


@dataclass(frozen=True, eq=False)
class Part:
    """That a view of a parameter became a part of a larger array, each dimension lying along the same one of it."""

    whole: Record
    dims: Dims
    dropped: tuple[tuple[Atom, str], ...]
    is_stopped: bool

    def uses(self, stopped: bool) -> list[Use]:
        """The uses of the larger array in terms of the parameter; none for a dimension of several roles."""
        found = self.whole.all_uses(False) if stopped == self.is_stopped else []
        found = [*found, *(self.whole.all_uses(True) if stopped else [])]
        return [use for other in found if (use := self._translated(other)) is not None]

    def _translated(self, use: Use) -> Use | None:
        letters: dict[int, set[str]] = {}
        for atom, letter in use.roles:
            letters.setdefault(atom.axis, set()).add(letter)
        if any(len(letters.get(d, "l")) > 1 for d, dim in enumerate(self.dims) if dim):
            return None
        roles = {atom: "l" for atom, _ in self.dropped if atom.axis >= 0}
        roles |= {
            atom: min(letters.get(d, "l")) for d, dim in enumerate(self.dims) for atom in dim if atom.axis >= 0
        }  # fmt: skip
        single = all(len(dim) == 1 and dim[0].stride == 1 for dim in self.dims)
        spec = tuple(self.dims[d][0].axis for d in use.kernel_spec) if use.kernel_spec and single else None
        return replace(use, roles=tuple(sorted(roles.items())), kernel_spec=spec)


@dataclass(eq=False)
class Record:
    """What one abstract run saw of one parameter: `stopped` are the uses behind a `stop_gradient`.

    `parts`: the larger arrays that the parameter was made a part of. `drops`: where dropout acts; `ruled`: whether
    a function with a derivative rule of its own, in which there is none, uses the parameter.
    """

    path: tuple[str, ...]
    uses: dict[Use, None] = field(default_factory=dict)
    stopped: dict[Use, None] = field(default_factory=dict)
    dense: dict[Dense, None] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    drops: dict[Drop, None] = field(default_factory=dict)
    ruled: bool = False

    def all_uses(self, stopped: bool) -> list[Use]:
        """The uses by itself, then those as a part of something."""
        own = self.stopped if stopped else self.uses
        return list(dict.fromkeys([*own, *(use for part in self.parts for use in part.uses(stopped))]))


@dataclass(frozen=True)
class Probe:
    """Kind of a parameter under observation; `record` is compared by identity.

    `is_formed`: this is a function of the weight, which has been noted as formed in full already.
    `is_stopped`: no gradient flows back from here. `is_ruled`: inside a function with a derivative rule of its own.
    """

    record: Record
    is_formed: bool = False
    is_stopped: bool = False
    is_ruled: bool = False

    @property
    def name(self) -> str:
        return ".".join(self.record.path)

    @property
    def watches(self) -> bool:
        return True

    def materialise(self, w: Virtual) -> jax.Array:
        return w.base

    def seen_dense(self, w: Virtual, primitive: str) -> None:
        """Notes that `w` was needed as an array: a lookup if it was indexed, else a materialisation."""
        own = tuple(atom for atom in w.visible if atom.axis >= 0)
        indexed = self._indexed(w)
        picked = bool(indexed) and any(atom.axis < 0 for atom in w.visible)
        if own and (picked or w.is_row):
            self._add("embedding", w, {**dict.fromkeys(own, "o"), **dict.fromkeys(indexed, "i")})
        if not w.is_row and not self.is_formed:
            self.record.dense[Dense(primitive, tuple(w.base.shape), picked)] = None

    def dot_general(self, w: Virtual, x: jax.Array, dot: DotGeneral, key: Any, eqn: Any) -> jax.Array:
        own = [atom for atom in dot.w if atom.axis >= 0]
        summed = [atom for atom in own if atom in dot.x and atom not in dot.y]
        kept = [atom for atom in own if atom not in dot.x]
        batch = [atom for atom in own if atom in dot.x and atom in dot.y]
        if self._indexed(w) and not kept:
            self.seen_dense(w, "dot_general")  # a row of a table used as an activation
        else:
            roles = {**dict.fromkeys(summed, "i"), **dict.fromkeys(kept, "o"), **dict.fromkeys(batch, "l")}
            self._add("experts" if batch else "linear", w, roles, drops=not dot.needs_array)
            if dot.needs_array:
                self.seen_dense(w, "dot_general")
        return _result(eqn)

    def conv(self, w: Virtual, x: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        if eqn.params["batch_group_count"] != 1:
            return None
        spec = eqn.params["dimension_numbers"].rhs_spec
        roles = {atom: "o" if d == spec[0] else "i" for d, dim in enumerate(w.dims) for atom in dim}
        whole = all(len(dim) == 1 and dim[0].stride == 1 for dim in w.dims)
        # A convolution that spreads its input is a transposed one, to which PyTorch gives another kernel.
        spreads = any(step != 1 for step in eqn.params["lhs_dilation"])
        axes = tuple(w.dims[d][0].axis for d in spec) if whole and not spreads else None
        self._add("conv", w, roles, drops=True, kernel_spec=axes, groups=eqn.params["feature_group_count"])
        return _result(eqn)

    def ragged_dot(self, w: Virtual, x: jax.Array, sizes: jax.Array, key: Any, eqn: Any) -> jax.Array | None:
        roles = {atom: role for dim, role in zip(w.dims, "lio", strict=True) for atom in dim}
        self._add("experts", w, roles, drops=True)
        return _result(eqn)

    def gather(self, w: Virtual, picks: Picks, indices: jax.Array, eqn: Any) -> Virtual:
        # Whether this was a lookup or the choice of a matrix is known only when the result is used.
        atoms = [w.dims[d][0] for d in picks]
        dims = rest_of_gather(w, picks, eqn, batch_atoms(min(atoms), eqn))
        gone = tuple((atom, "pick") for atom in atoms)
        return w.replace(base=_result(eqn), dims=dims, dropped=(*w.dropped, *gone))

    def times(self, w: Virtual, factor: Callable[[jax.Array], jax.Array]) -> Virtual:
        return w.replace(base=factor(w.base))

    def stopped(self, w: Virtual) -> Virtual:
        return w.replace(kind=replace(self, is_stopped=True))

    def undropped(self, w: Virtual) -> Virtual:
        return w.replace(kind=replace(self, is_ruled=True))

    def follow(self, w: Virtual, eqn: Any, outs: list[Any], alone: bool) -> list[Any]:
        """Keeps watching a weight through an elementwise function of it: its axes still mean the same.

        `alone`: of nothing else, so that a sum is one of the weight with itself (a straight-through estimator).
        """
        follows = eqn.primitive.name in ELEMENTWISE or (alone and eqn.primitive.name in ("add", "sub"))
        if follows and tuple(outs[0].shape) == tuple(w.base.shape):
            return [w.replace(base=outs[0], kind=replace(self, is_formed=True))]
        return outs

    def seen_formed(self, w: Virtual, primitive: str) -> Virtual:
        """Notes that `w` is formed in full here, and keeps watching it."""
        self.seen_dense(w, primitive)
        return w.replace(kind=replace(self, is_formed=True))

    def joined(self, pieces: Sequence[Virtual], whole: Any) -> Virtual:
        """The array that `pieces` were written into side by side: what it is used for, they are used for."""
        record = Record(self.record.path)
        for w in pieces:
            assert isinstance(w.kind, Probe)
            w.kind.record.parts.append(Part(record, w.dims, w.dropped, w.kind.is_stopped))
        return replace(probe_weight(self.record.path, whole), kind=Probe(record, is_formed=True))

    def _indexed(self, w: Virtual) -> list[Atom]:
        return [atom for atom, how in w.dropped if how == "pick" and atom.axis >= 0 and atom.size > 1]

    def _add(self, op: str, w: Virtual, roles: dict[Atom, str], drops: bool = False, **details: Any) -> None:
        every = {**{atom: "l" for atom, _ in w.dropped if atom.axis >= 0}, **roles}
        use = Use(op, tuple(sorted(every.items())), **details)
        (self.record.stopped if self.is_stopped else self.record.uses)[use] = None
        if self.is_ruled:
            self.record.ruled = True
        elif drops and not self.is_formed:
            self.record.drops[Drop(op, use.roles, frozenset(atom.axis for atom in self._indexed(w)))] = None


def _result(eqn: Any) -> jax.Array:
    """Something of the result's type; the run is abstract, so nothing is computed."""
    return _compat.zeros_of(eqn.outvars[0].aval)


def probe_weight(path: tuple[str, ...], base: Any) -> Virtual:
    """The virtual weight of a whole parameter under observation."""
    dims = tuple((Atom(d, 1, n),) for d, n in enumerate(base.shape))
    return Virtual(base, {}, None, dims, (), (), (), Probe(Record(path)))
