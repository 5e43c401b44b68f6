"""One pass over data: a statistic of what every adapted weight is multiplied by, gathered by the interpreter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tracing
from lora_jax.inits.assemble import low_rank, weights_of
from lora_jax.inits.batches import arguments
from lora_jax.interpret import Interpreter
from lora_jax.planning import Plan
from lora_jax.recording import Recorder, State
from lora_jax.sites import Site
from lora_jax.weights.observed import observed_weight

ROWS = "rows"


class Statistic(Protocol):
    """What is kept of the inputs of one layer: a dictionary of arrays, `"rows"` the number of inputs among them.

    Hashable: equal ones share a compilation.
    """

    def start(self, site: Site) -> dict[str, jax.Array]: ...

    def update(self, state: dict[str, jax.Array], rows: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
        """`rows` are inputs (n, fan_in), `weights` (n,) is zero where one does not count."""
        ...


def collect(
    plan: Plan,
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    statistic: Statistic,
    mask: Callable[..., jax.Array] | None = None,
) -> Iterator[State]:
    """The states after each batch, `{parameter name: {what: (layers, ...)}}`; the memory of one is used for the next.

    The model runs as it is, once for each batch, under one `jax.jit`; its outputs are not computed.

    **Raises:** `ValueError` for no batch, and after the last for layers that met no input, each by name.
    """
    sites = low_rank(plan)
    weights_of(plan, params)
    state = {site.name: _layers(statistic.start(site), site) for site in sites}
    count = 0
    for batch in batches:
        state = _add(state, params, *arguments(batch), plan=plan, fn=fn, statistic=statistic, mask=mask)
        count += 1
        yield state
    if not count:
        raise ValueError("`batches` is empty: there are no inputs to learn from.")
    check_seen(plan, state)


def last(states: Iterable[State]) -> State:
    """The last of them, once all batches are used up."""
    state: State = {}
    for state in states:  # noqa: B007
        pass
    return state


def _layers(state: dict[str, jax.Array], site: Site) -> dict[str, jax.Array]:
    layers = math.prod(site.sizes_of("l"))
    return {name: jnp.repeat(array[None], layers, axis=0) for name, array in state.items()}


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("plan", "fn", "statistic", "mask"))
def _add(
    state: State,
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    plan: Plan,
    fn: Callable[..., Any],
    statistic: Statistic,
    mask: Callable[..., jax.Array] | None,
) -> State:
    recorder = Recorder(state)
    weights = None if mask is None else jnp.asarray(mask(*args, **kwargs))
    traced = tracing.trace(fn, params, args, kwargs)
    inputs = list(traced.inputs)
    where = {path: i for i, path in enumerate(traced.paths)}
    for site in low_rank(plan):
        i = where[site.path]
        of_rows = functools.partial(_row_weights, site, weights)
        inputs[i] = observed_weight(site, inputs[i], recorder, statistic.update, of_rows)
    Interpreter(lambda w, primitive: None, recorder=recorder).run_dense(traced.jaxpr, traced.consts, inputs)
    return recorder.state


def _row_weights(site: Site, weights: jax.Array | None, data: tuple[int, ...]) -> jax.Array | None:
    """One weight for each row of data of this shape."""
    if weights is None:
        return None
    shape = weights.shape
    if data[: len(shape)] == shape:
        return jnp.broadcast_to(weights.reshape(*shape, *(1,) * (len(data) - len(shape))), data).ravel()
    if math.prod(data) == weights.size:
        return weights.ravel()
    raise ValueError(
        f"`mask` has shape {shape}, and the inputs of `{site.name}` are laid out as {data}: it needs the first of "
        "these dimensions. Leave the parameter out with `exclude_modules`, or use no mask."
    )


def check_seen(plan: Plan, state: State) -> None:
    """Raises a `ValueError` naming every layer that met no input."""
    problems = []
    for site in low_rank(plan):
        rows = np.asarray(jax.device_get(state[site.name][ROWS]))
        if not rows.any():
            problems.append(f"`{site.name}` {site.shape}")
        elif not rows.all():
            problems.append(f"`{site.name}` layers {np.flatnonzero(rows == 0).tolist()}")
    if problems:
        raise ValueError(
            f"no inputs were seen for {'; '.join(problems)}. Lookups have none, and products inside `shard_map` or "
            "with a part of a weight are not observed: leave these out with `exclude_modules`. An expert that no token "
            "chose needs more batches."
        )
