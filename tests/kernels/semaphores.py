"""Semaphores for Pallas' GPU interpreter, which has none: counters on the host, of one array of them for a kernel.

The interpreter runs one cluster of a grid after the other, so that nobody may wait for another cluster.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas import primitives
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter

SECONDS = 120.0  # after which a wait has failed


@contextlib.contextmanager
def counted(monkeypatch: Any) -> Iterator[tuple[Counter[int], Counter[tuple[int, int]]]]:
    """Kernels that are traced and run inside may use one array of semaphores.

    Yields the count of each, and how many waited for which count of which: with one cluster, a wait that is missing
    would not show otherwise.
    """
    counts: Counter[int] = Counter()
    waits: Counter[tuple[int, int]] = Counter()
    changed = threading.Condition()

    def signal(token: Any, index: Any, by: Any) -> Any:
        with changed:
            counts[int(index)] += int(by)
            changed.notify_all()
        return np.int32(token)

    def wait(token: Any, index: Any, value: Any) -> Any:
        with changed:
            waits[int(index), int(value)] += 1
            if not changed.wait_for(lambda: counts[int(index)] >= int(value), SECONDS):
                raise TimeoutError(f"semaphore {index} is {counts[int(index)]} and never {value}")
        return np.int32(token)

    def in_order(fn: Any) -> Any:
        """In the place of a primitive that kernels for Hopper have no use for: one that the token orders."""

        def interpreted(self: Any, eqn: Any, token: Any, values: Any) -> Any:
            _, (indexer,), value, *_ = jax.tree.unflatten(eqn.params["args_tree"], values())
            shape = jax.ShapeDtypeStruct((), jnp.int32)
            return callback.io_callback(fn, shape, token, jnp.int32(indexer.indices[0]), value), []

        return interpreted

    plain = JaxprInterpreter._interpret_arithmetic_primitive

    def allocated(self: Any, eqn: Any, values: Any) -> Any:
        return jnp.int32(0) if eqn.primitive is primitives.get_global_p else plain(self, eqn, values)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_primitives, "try_cluster_cancel_p", primitives.semaphore_signal_p)
        patch.setattr(gpu_primitives, "query_cluster_cancel_p", primitives.semaphore_wait_p)
        patch.setattr(JaxprInterpreter, "_interpret_try_cluster_cancel_p", in_order(signal))
        patch.setattr(JaxprInterpreter, "_interpret_query_cluster_cancel_p", in_order(wait))
        patch.setattr(JaxprInterpreter, "_interpret_arithmetic_primitive", allocated)
        yield counts, waits
