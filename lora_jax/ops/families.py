"""The families of fused kernels that a product may run on, and what each must offer.

A family is a module with these functions, on matrices of one dtype, with the scale already in `b`:

    unsupported(m, k, n, rank, dtype) -> why it can't compute these sizes, or None
    slower(m, k, n, rank, dtype, dropped, device_kind) -> why XLA is faster there, or None (optional)
    faster(m, k, n, rank, dropped, device_kind) -> where it says nothing, the reason for these kernels (optional)
    h_layout(rank) -> (whether `h` is (R', M') and not (M', R'), R')
    forward(x, w, a, b, drop, transposed=, bias=) -> (y, h); bias (N,) or None, of x's dtype or float32, is added to
        the float32 sums before they are rounded
    backward(dy, x, w, a, b, h, drop, transposed=, wants=) -> (dx, da, db), da and db in float32
    Drop(seed, threshold): `seed` is four int32: the key's two words, and the first row and column of `x` in
        the whole array, the column a multiple of 128
    Wants(x, a, b)
    stages(m, k, n, rank, dtype, threshold) -> what of it `tune` can tune, as `lora_jax.kernels.stage.Stage`s (optional)

`h` may come back with as few as M rows.

A family may have a second module for several products that share `x` and its mask, of weights (K, N):

    unsupported(m, k, ns, ranks, dtype) -> why it can't take together what it can compute one by one, or None
    slower(m, k, ns, ranks, dropped) -> why they are faster one by one, or None (optional)
    h_layout(ranks) -> (whether the `h` of all is (R', M') and not (M', R'), the R' of each, one after the other)
    forward(x, ws, a_s, b_s, drop, biases=) -> (ys, h)
    backward(dys, x, ws, a_s, b_s, h, drop, wants=) -> (dx, das, dbs); `wants` is for any of them

And a third, for M rows in `runs` equal runs, each with factors of its own, without dropout:

    unsupported(m, k, n, rank, runs, dtype) -> why it can't compute these sizes, or None
    forward(x, w, a_s, b_s, transposed=) -> (y, h); factors (runs, K, R) and (runs, R, N), `h` as in the first module
    backward(dy, x, w, a_s, b_s, h, transposed=, wants=) -> (dx, das, dbs), the last two in float32

Modules are imported when they are first needed: Pallas takes its time.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Family:
    """A module of kernels and the machines it is for."""

    module: str
    platforms: tuple[str, ...]
    needs: str
    # Least and greatest compute capability; None where the platform alone decides.
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    group: str | None = None  # the module for several products
    many: str | None = None  # the module for an adapter of each run of rows

    def load(self) -> ModuleType | str:
        """The modules' first, or why they can't be imported."""
        try:
            for other in (self.group, self.many):
                if other is not None:
                    importlib.import_module(other)
            return importlib.import_module(self.module)
        except ImportError as error:
            return f"its kernels can't be imported: {error}"


# The first that nothing speaks against is taken.
# Tests put a family of reference kernels here, under a name of its own or in the place of one of these.
FAMILIES: dict[str, Family] = {
    "mosaic_gpu": Family(
        "lora_jax.kernels.mosaic_lora",
        ("cuda",),
        "a Hopper GPU (H100, H200)",
        ((9, 0), (9, 0)),
        group="lora_jax.kernels.mosaic_group",
        many="lora_jax.kernels.mosaic_many",
    ),
    "triton": Family("lora_jax.kernels.triton_lora", ("cuda",), "an Ampere, Ada or Hopper GPU", ((8, 0), (9, 0))),
}


def kernels(name: str) -> Any:
    module = FAMILIES[name].load()
    assert not isinstance(module, str), module
    return module


def group_kernels(name: str) -> Any:
    """The module for several products, or None."""
    group = FAMILIES[name].group
    return None if group is None else importlib.import_module(group)


def many_kernels(name: str) -> Any:
    """The module for an adapter of each run of rows, or None."""
    many = FAMILIES[name].many
    return None if many is None else importlib.import_module(many)
