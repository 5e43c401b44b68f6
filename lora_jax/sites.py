"""One adapted parameter, described by static data that travels with its factors.

Letters used throughout the library:
    l  lead: stacked layers, experts, slots indexed away. Both factors carry these axes.
    i  in:   axes of the left factor `lora_A`.
    o  out:  axes of the right factor `lora_B`.
    r  rank.

    delta_W[l, i, o] = scale * sum_r lora_A[l, i, r] * lora_B[l, r, o]

With DoRA the weight is `magnitude[l, o] / |W + delta_W|[l, o] * (W + delta_W)[l, i, o]`, with norms over the in axes.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

LORA_A = "lora_A"
LORA_B = "lora_B"
MAGNITUDE = "lora_magnitude_vector"
LORA_BIAS = "lora_bias"
TOKENS = "trainable_tokens"


@dataclass(frozen=True, order=True)
class Atom:
    """A digit of one parameter axis in mixed radix: `index // stride % size`.

    An axis that no use splits is the single atom `(axis, 1, length)`. A reshape such as
    `(D, N*H) -> (D, N, H)` splits axis 1 into `(1, H, N)` and `(1, 1, H)`.
    """

    axis: int
    stride: int
    size: int

    @property
    def is_repeat(self) -> bool:
        """Whether this stands for a dimension along which a view repeats the parameter."""
        return self.stride == 0


@dataclass(frozen=True)
class Site:
    """Where and how one parameter is adapted; hashable, so it can sit in a pytree's structure.

    **Fields:**

    - `path`: key path of the parameter in the params pytree, e.g. `("layers_0", "q_proj", "kernel")`.
    - `shape`, `dtype`: of the base parameter.
    - `op`: `"linear"`, `"embedding"`, `"conv"`, `"experts"`, or `"full"` (a trainable copy, PEFT's
      `modules_to_save`, which has no factors).
    - `atoms`, `roles`: the parameter's axes in row-major order and one letter of `l i o` each.
    - `rank`, `alpha`, `rslora`: scale is `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA.
    - `kernel_spec`, `groups`: for `"conv"`, the positions (out, in, *spatial) and feature groups; no positions for a
      reshaped kernel or a transposed convolution, which have no form in PEFT.
    - `tied`: the model also uses the parameter the other way round, as an embedding table that is the output head
      as well. The adapter, or the copy trained in full, changes both uses; an exporter has to write both.
    - `tokens`: rows of a looked-up table that are trained in place of factors; the leaf holds the rows themselves,
      (token, *out). The table is then W + A·B with A one-hot and B the rows' differences, of rank `len(tokens)`.
    - `group`: QALoRA's: A has one row for this many inputs (`Adapter.factors` repeats it for each of them).
    - `lora_bias`: a trained bias on B (`lora_jax/weights/lora_bias.py`).
    - `dora`: a trained magnitude for each lead and out position (`lora_jax/weights/dora.py`).
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    op: str
    atoms: tuple[Atom, ...] = ()
    roles: str = ""
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    kernel_spec: tuple[int, ...] | None = None
    groups: int = 1
    tied: bool = False
    dora: bool = False
    lora_bias: bool = False
    tokens: tuple[int, ...] = ()
    group: int = 1

    @cached_property
    def name(self) -> str:
        """Dotted name of the parameter."""
        return ".".join(self.path)

    @property
    def module(self) -> str:
        """Dotted name of the module that owns the parameter."""
        return ".".join(self.path[:-1])

    @property
    def seed(self) -> int:
        """What tells this parameter's random numbers from another's: a function of its path only.

        Joined by a character that no name has, unlike the dot: `("a.b",)` is another path than `("a", "b")`.
        """
        return zlib.crc32("\x1f".join(self.path).encode())

    @property
    def is_full(self) -> bool:
        return self.op == "full"

    @property
    def is_low_rank(self) -> bool:
        """Whether `lora_A` and `lora_B` are what is trained."""
        return not self.is_full and not self.tokens

    @property
    def scale(self) -> float:
        """What A @ B is multiplied by; 1 for a full copy, which has no factors."""
        if self.is_full:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def atoms_of(self, role: str) -> tuple[Atom, ...]:
        return tuple(atom for atom, letter in zip(self.atoms, self.roles, strict=True) if letter == role)

    def sizes_of(self, role: str) -> tuple[int, ...]:
        return tuple(atom.size for atom in self.atoms_of(role))

    @cached_property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of `lora_A`: (*lead, *in, rank); of `group` inputs together, (*lead, in // group, rank)."""
        inner = self.sizes_of("i") if self.group == 1 else (self.fan_in // self.group,)
        return (*self.sizes_of("l"), *inner, self.rank)

    @cached_property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of `lora_B`: (*lead, rank, *out)."""
        return (*self.sizes_of("l"), self.rank, *self.sizes_of("o"))

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of what is trained beside the two factors, each of shape `vector_shape`."""
        return (MAGNITUDE,) * self.dora + (LORA_BIAS,) * self.lora_bias

    @cached_property
    def vector_shape(self) -> tuple[int, ...]:
        """One number for each output of each matrix: (*lead, *out)."""
        return (*self.sizes_of("l"), *self.sizes_of("o"))

    @property
    def fan_in(self) -> int:
        return math.prod(self.sizes_of("i"))

    @property
    def fan_out(self) -> int:
        return math.prod(self.sizes_of("o"))

    @property
    def parameters(self) -> int:
        """Trainable parameters this site adds."""
        return sum(map(math.prod, self.leaves.values()))

    @cached_property
    def leaves(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """`{path in the adapter tree: shape}` of every leaf that this site trains."""
        if self.is_full:
            return {self.path: self.shape}
        if self.tokens:
            return {self.leaf_path(TOKENS): self.b_shape}
        factors = {LORA_A: self.a_shape, LORA_B: self.b_shape, **dict.fromkeys(self.vectors, self.vector_shape)}
        return {self.leaf_path(name): shape for name, shape in factors.items()}

    def leaf_path(self, factor: str) -> tuple[str, ...]:
        """Path of a factor in the adapter tree: `.../q_proj/lora_A/kernel`."""
        return (*self.path[:-1], factor, self.path[-1])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; `Site.from_dict` restores it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        fields = dict(data)
        fields["path"], fields["shape"] = tuple(fields["path"]), tuple(fields["shape"])
        fields["tokens"] = tuple(fields.get("tokens", ()))
        fields["atoms"] = tuple(Atom(**atom) for atom in fields["atoms"])
        spec = fields.get("kernel_spec")
        fields["kernel_spec"] = None if spec is None else tuple(spec)
        return cls(**fields)
