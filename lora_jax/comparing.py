"""`compare`: how far two adapters are apart, parameter by parameter, from their factors alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lora_jax import products
from lora_jax.adapters import Adapter
from lora_jax.editing import check_only_factors
from lora_jax.sites import Site


@dataclass(frozen=True)
class Difference:
    """Two changes D1 = s1 A1 B1 and D2 of one parameter, or of one matrix of a stack of them.

    **Fields:**

    - `ranks`, `norms`: of each, the norms Frobenius'.
    - `cosine`: <D1, D2> / (||D1|| ||D2||), NaN if one is zero.
    - `relative`: ||D1 - D2|| / ||D1||; 0 if both are zero, infinite if only D1 is.
    - `angles_in`, `angles_out`: principal angles, in radians from large to small, between what the two read (the
      column spaces of A where B does not vanish) and between what they write. Empty if one change is zero.
    """

    name: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float
    relative: float
    angles_in: np.ndarray
    angles_out: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """`print` it. `rows`, the names that only one of the two adapts, and both measures over all common rows."""

    rows: tuple[Difference, ...]
    only_in_first: tuple[str, ...] = ()
    only_in_second: tuple[str, ...] = ()
    cosine: float = field(init=False)
    relative: float = field(init=False)

    def __post_init__(self) -> None:
        cosine, relative = in_total([(row.norms, row.cosine, row.relative) for row in self.rows])
        object.__setattr__(self, "cosine", cosine)
        object.__setattr__(self, "relative", relative)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=9)
        lines = [f"{'parameter':<{width}}  ranks    norm 1    norm 2    cosine  relative  angle in  angle out"]
        for row in self.rows:
            angles = [f"{math.degrees(a[0]):.1f}°" if a.size else "" for a in (row.angles_in, row.angles_out)]
            lines.append(
                f"{row.name:<{width}}  {row.ranks[0]:>2} {row.ranks[1]:>2}  {row.norms[0]:8.4g}  {row.norms[1]:8.4g}  "
                f"{row.cosine:8.5f}  {row.relative:8.3g}  {angles[0]:>8}  {angles[1]:>9}"
            )
        lines += [f"only in the first: {name}" for name in self.only_in_first]
        lines += [f"only in the second: {name}" for name in self.only_in_second]
        return "\n".join([*lines, f"in total: cosine {self.cosine:.5f}, relative difference {self.relative:.3g}"])


def compare(one: Adapter, other: Adapter) -> Comparison:
    """Compares two adapters of one model, in float64 on the host; ranks, alphas and dtypes may differ.

    **Raises:** `ValueError` for a parameter that the two split differently, and for `modules_to_save` and DoRA,
    whose change the factors alone do not tell.
    """
    for adapter, which in ((one, "first"), (other, "second")):
        check_only_factors(adapter.sites, f"`compare` cannot take the {which} adapter")
    first, second = ({site.path: site for site in adapter.sites} for adapter in (one, other))
    rows: list[Difference] = []
    for path, site in first.items():
        if path not in second:
            continue
        pair = (site, second[path])
        if len({(s.shape, s.atoms, s.roles) for s in pair}) > 1:
            raise ValueError(
                f"`{site.name}` is {site.shape} with roles {site.roles!r} in the first adapter, {pair[1].shape} with "
                f"{pair[1].roles!r} in the second: they are not of one model, or were planned differently."
            )
        matrices = [_matrices(s, a.factors(s)) for s, a in zip(pair, (one, other), strict=True)]
        for i, (x, y) in enumerate(zip(*matrices, strict=True)):
            name = site.name if len(matrices[0]) == 1 else f"{site.name}[{i}]"
            rows.append(difference(name, x, y))
    return Comparison(
        tuple(rows),
        tuple(site.name for path, site in first.items() if path not in second),
        tuple(site.name for path, site in second.items() if path not in first),
    )


def difference(name: str, one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> Difference:
    """Compares two products `left @ right`, (m, r) by (r, n) in float64, the scale in one of them."""
    norms = products.frobenius(*one), products.frobenius(*other)
    gap = products.distance(*one, *other)
    return Difference(
        name,
        (one[0].shape[1], other[0].shape[1]),
        norms,
        ratio(products.inner(*one, *other), norms[0] * norms[1], math.nan),
        ratio(gap, norms[0], 0.0 if gap == 0 else math.inf),
        *products.principal_angles(one, other),
    )


def in_total(rows: list[tuple[tuple[float, float], float, float]]) -> tuple[float, float]:
    """Cosine and relative difference of several (norms, cosine, relative), taken as one vector."""
    # A zero change has no cosine and adds nothing; relative is infinite where only the first is zero.
    size1, size2 = (math.sqrt(sum(norms[i] ** 2 for norms, _, _ in rows)) for i in (0, 1))
    inner = sum(cosine * norms[0] * norms[1] for norms, cosine, _ in rows if norms[0] * norms[1] != 0)
    gap = math.sqrt(sum((relative * norms[0] if norms[0] else norms[1]) ** 2 for norms, _, relative in rows))
    return ratio(inner, size1 * size2, math.nan), ratio(gap, size1, 0.0 if gap == 0 else math.inf)


def ratio(value: float, size: float, empty: float) -> float:
    """`value / size`, or `empty` where there is no size."""
    return value / size if size != 0 else empty


def _matrices(site: Site, factors: tuple[object, object]) -> list[tuple[np.ndarray, np.ndarray]]:
    a, b = (np.asarray(x).astype(np.float64) for x in factors)
    left, right = a.reshape(-1, site.fan_in, site.rank), b.reshape(-1, site.rank, site.fan_out)
    return [(site.scale * x, y) for x, y in zip(left, right, strict=True)]
