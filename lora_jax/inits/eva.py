"""EVA: A from the principal components of each weight's inputs, ranks to where they explain most."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.algebra import as_factors, first, randomised_svd
from lora_jax.inits.assemble import Pair, adapter_of, low_rank
from lora_jax.inits.collect import ROWS, check_seen, collect, last
from lora_jax.planning import Plan
from lora_jax.recording import State
from lora_jax.sites import Site

# Power iterations; twice as many random vectors as components, as PEFT.
ITERATIONS = 4


@dataclasses.dataclass(frozen=True)
class Components:
    """The leading components of centred inputs, updated batch by batch (an incremental SVD).

    `rows`, `mean` and the sum of squares about it are exact; `values` (singular values times components, most
    important first) forgets what was beyond `rho` times the rank after every batch.

    **Source:** Ross, Lim, Lin, Yang, Incremental learning for robust visual tracking, IJCV 77, 2008, section 3.1.
    """

    rho: float

    def start(self, site: Site) -> dict[str, jax.Array]:
        wide = jnp.promote_types(site.dtype, jnp.float32)
        components = min(round(site.rank * self.rho), site.fan_in)
        return {
            "values": jnp.zeros((components, site.fan_in), wide),
            "mean": jnp.zeros(site.fan_in, wide),
            "squares": jnp.zeros((), wide),
            ROWS: jnp.zeros((), jnp.float32),
        }

    def update(self, state: dict[str, jax.Array], rows: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
        old, new = state[ROWS], weights.sum()
        total = jnp.maximum(old + new, 1)
        mean = weights @ rows / jnp.maximum(new, 1)
        centred = jnp.sqrt(weights)[:, None] * (rows - mean)
        between = jnp.sqrt(old * new / total) * (state["mean"] - mean)
        components = len(state["values"])
        every = jnp.concatenate([state["values"], centred.astype(mean.dtype), between[None]])
        # The random vectors only have to be independent of the data.
        with jax.default_matmul_precision("highest"):
            found = randomised_svd(every, components, jax.random.key(0), ITERATIONS, components)
        _, s, vh = first(components, *found)
        return {
            "values": (s[:, None] * vh).astype(state["values"].dtype),
            "mean": state["mean"] + (mean - state["mean"]) * new / total,
            "squares": state["squares"] + (centred**2).sum() + (between**2).sum(),
            ROWS: old + new,
        }


def eva(
    plan: Plan,
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rho: float = 2.0,
    tau: float | None = None,
    whiten: bool = False,
    adjust_alpha: bool = True,
    mask: Callable[..., jax.Array] | None = None,
) -> Adapter:
    """A's columns are the directions in which a weight's inputs vary most, B is zero; the base stays as it is.

    The ranks of the plan are a budget: of all components of all weights, those with the largest share of their own
    inputs' variance are taken, at most `rho` times a weight's planned rank for each.

    **Arguments:**

    - `fn`, `batches`, `mask`: as for `corda`.
    - `rho`: 1 keeps every rank as planned.
    - `tau`: None uses all batches; a number stops after the first for which no component that is taken has moved by
      more than this cosine (PEFT: 0.99). For an endless iterator.
    - `whiten`: divide each direction by the square root of its singular value.
    - `adjust_alpha`: alpha follows the rank, so that the scale stays as planned.

    **Returns:** an adapter whose sites have ranks and alphas of their own. The layers of a stack share the largest of
    their ranks: the columns that a layer was not given are zero and never train, and neither does the single one of a
    weight that was given none, which PEFT leaves out of the adapter. Deterministic.

    **Raises:** `ValueError` for no batch, weights whose inputs were not seen, `rho` below 1, batches that end before
    `tau` is met, or layers of one stack that would need different scales (`adjust_alpha=False`).

    **Source:** Paischer et al., arXiv:2410.07170; the incremental decomposition as PEFT's. With rsLoRA, `adjust_alpha`
    keeps alpha / sqrt(rank); PEFT multiplies by the ratio of ranks there too.
    """
    if not rho >= 1:
        raise ValueError(f"`rho={rho!r}` must be at least 1, the factor by which a rank may grow.")
    if tau is not None and not 0 <= tau <= 1:
        raise ValueError(f"`tau={tau!r}` is a cosine between 0 and 1, or None.")
    sites = low_rank(plan)
    states = collect(plan, fn, params, batches, Components(float(rho)), mask)
    state = last(states) if tau is None else _until(tau, plan, states)
    found = {site.name: _components(state[site.name]) for site in sites}
    ranks = _ranks(sites, found)
    pairs: dict[tuple[str, ...], Pair] = {}
    own: dict[tuple[str, ...], Site] = {}
    for site in sites:
        values, directions, _ = found[site.name]
        given = ranks[site.name]
        new = _with_rank(site, given, adjust_alpha)
        a = np.where(np.arange(new.rank) < given[:, None], 1.0, 0.0)[..., None] * directions[:, : new.rank]
        if whiten:
            a /= np.sqrt(np.where(values > 0, values, 1))[:, : new.rank, None]
        pairs[site.path] = as_factors(
            new, jnp.asarray(a.swapaxes(-1, -2)), jnp.zeros((len(given), new.rank, site.fan_out)), plan.config.dtype
        )  # fmt: skip
        own[site.path] = new
    return adapter_of(plan, params, pairs, own)


def _components(state: dict[str, jax.Array]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular values, directions of unit length (zero where there is none) and shares of the variance, by layer."""
    scaled, squares = (np.asarray(jax.device_get(state[name])) for name in ("values", "squares"))
    values = np.linalg.norm(scaled, axis=-1)
    directions = scaled / np.where(values > 0, values, 1)[..., None]
    return values, directions, values**2 / np.where(squares > 0, squares, 1)[:, None]


def _ranks(sites: tuple[Site, ...], found: dict[str, Any]) -> dict[str, np.ndarray]:
    """How many components each layer of each weight is given out of the sum of the planned ranks."""
    shares = [share for site in sites for share in found[site.name][2]]  # one a layer
    owner = np.concatenate([np.full(len(share), n) for n, share in enumerate(shares)])
    budget = sum(site.rank * len(found[site.name][2]) for site in sites)
    chosen = np.argsort(-np.concatenate(shares), kind="stable")[:budget]
    counts = np.bincount(owner[chosen], minlength=len(shares))
    ends = np.cumsum([len(found[site.name][2]) for site in sites])
    return dict(zip((site.name for site in sites), np.split(counts, ends[:-1]), strict=True))


def _with_rank(site: Site, given: np.ndarray, adjust: bool) -> Site:
    rank = max(1, int(given.max()))
    if adjust:
        ratio = rank / site.rank
        return dataclasses.replace(site, rank=rank, alpha=site.alpha * (math.sqrt(ratio) if site.rslora else ratio))
    if len(set(given.tolist())) > 1:
        raise ValueError(
            f"`{site.name}` is a stack whose layers were given ranks {given.tolist()}, and with `adjust_alpha=False` "
            "each would need a scale of its own: leave `adjust_alpha` on, or write `rho=1`."
        )
    return dataclasses.replace(site, rank=rank)


def _until(tau: float, plan: Plan, states: Iterable[State]) -> State:
    """The first state whose chosen components agree with those before."""
    sites = low_rank(plan)
    before: dict[str, Any] = {}
    worst = 0.0
    for state in states:
        found = {site.name: _components(state[site.name]) for site in sites}
        if before:
            ranks = _ranks(sites, found)
            worst = min(_agreement(before[name], found[name], ranks[name]) for name in found)
            if worst >= tau:
                check_seen(plan, state)
                return state
        before = found
    raise ValueError(
        f"`batches` ended before every component had settled: the cosine of one is {worst:.3f}, `tau={tau}`. Repeat "
        "them (`itertools.cycle`), or write `tau=None`."
    )


def _agreement(before: Any, after: Any, ranks: np.ndarray) -> float:
    """The smallest cosine between components of two consecutive states, up to sign, of those that are taken."""
    cosines = np.abs((before[1] * after[1]).sum(-1))
    taken = np.arange(cosines.shape[-1]) < ranks[:, None]
    return float(np.where(taken, cosines, 1.0).min())
