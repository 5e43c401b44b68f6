"""Products of rows with an adapter each, on `reference_many`, and the exact answers: for one process or over a mesh."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import reference
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.many import Many, many_contract
from tests.core.harness import cast, normal
from tests.kernels import reference_kernels

F16 = np.float16
ROWS, TOKENS, K, N, R, SLOTS = 4, 6, 64, 48, 3, 3
IDS = np.array([2, 0, -1, 2], np.int32)
SCALE = np.array([0.5, 1.5, -2.0], np.float32)
SPEC = Contraction(x=("t", "k"), w=("k", "n"), first=("k", "r"), second=("r", "n"), y=("t", "n"))
X, DY = cast(normal(ROWS, TOKENS, K), F16), cast(normal(ROWS, TOKENS, N, seed=1), F16)
W = cast(normal(K, N) / 8, F16)
A, B = cast(normal(K, SLOTS, R) / 8, np.float32), cast(normal(SLOTS, R, N), np.float32)

# Specs of x, W, A, B and dy on a (2, 2) mesh, and the rows, tokens, K and N of one device.
CASES = {
    "data": ((P("d"), P(), P(), P(), P("d")), (2, 6, K, N)),
    "data, both axes": ((P(("d", "t")), P(), P(), P(), P(("d", "t"))), (1, 6, K, N)),
    "batch and sequence": ((P("d", "t"), P(), P(), P(), P("d", "t")), (2, 3, K, N)),
    "column": ((P("d"), P(None, "t"), P(), P(None, None, "t"), P("d", None, "t")), (2, 6, K, N // 2)),
    "row": ((P("d", None, "t"), P("t"), P("t"), P(), P("d")), (2, 6, K // 2, N)),
}


def run(selection: str | None, transposed: bool = False) -> Any:
    """`(x, w, a, b, dy, ids) -> y` and the gradients of the first four."""
    spec = SPEC if not transposed else Contraction(**{**vars(SPEC), "w": ("n", "k")})
    many = Many(("k", "slot", "r"), ("slot", "r", "n"), SLOTS, selection)

    def fn(x: Any, w: Any, a: Any, b: Any, dy: Any, ids: Any) -> Any:
        def rows(x: Any, w: Any, a: Any, b: Any) -> Any:
            one = functools.partial(many_contract, spec, many)
            return jax.vmap(lambda x, i: one(x, w, a, b, SCALE, i, None, "q.kernel"))(x, ids)

        y, back = jax.vjp(rows, x, w, a, b)
        return y, *back(dy)

    return fn


def answers(ids: Sequence[int] = IDS) -> list[tuple[np.ndarray, np.ndarray]]:
    """Value or gradient of y, x, w, A and B, and a bound."""
    found = {n: [np.zeros(v.shape), np.zeros(v.shape)] for n, v in {"y": DY, "x": X, "w": W, "a": A, "b": B}.items()}
    for row, i in enumerate(ids):
        a, b, own = (A[:, i], B[i] * SCALE[i], SCALE[i]) if i >= 0 else (0 * A[:, 0], 0 * B[0], 0.0)
        exact = reference.fused(X[row], W, a, b, DY[row], F16)
        sizes = {n: size for n, (_, size) in reference.lora_dot_gradients(X[row], W, a, b, 1.0, DY[row]).items()}
        sizes["y"] = reference.lora_dot(X[row], W, a, b, 1.0)[1]
        # The factors are rounded to float16 as well, which `fused` takes for given.
        exact = {n: (value, bound + 2 * reference.unit_roundoff(F16) * sizes[n]) for n, (value, bound) in exact.items()}
        dw = reference.lora_dot_gradients(X[row], W, a, b, 1.0, DY[row])["w"][0]
        exact["w"] = dw, reference.tolerance(F16, ROWS * TOKENS) * sizes["w"]
        exact["b"] = tuple(part * factor for part, factor in zip(exact["b"], (own, abs(own)), strict=True))
        places = {"y": row, "x": row, "w": ..., "a": (slice(None), max(i, 0)), "b": max(i, 0)}
        for n, place in places.items():
            for total, part in zip(found[n], exact[n], strict=True):
                total[place] += part
    return [(value, bound) for value, bound in found.values()]


def check(got: Sequence[Any]) -> None:
    """Within the bounds; with another adapter for a row, or none, results would not be."""
    want = answers()
    for name, value, (exact, bound) in zip("y x w a b".split(), jax.device_get(got), want, strict=True):
        excess = reference.excess(value, exact, bound + 1e-30)
        assert excess <= 1, (name, excess)
    for wrong in ([0, 0, -1, 2], [2, 0, -1, -1], [2, 0, 0, 2]):
        for place, (value, _) in enumerate(answers(wrong)):
            if place != 2:
                assert reference.excess(value, want[place][0], want[place][1] + 1e-30) > 1, (wrong, place)


def automatic(name: str) -> None:
    """Under `jit` over a mesh with automatic axes: a device runs the kernels on its part of the rows."""
    (*specs, dy), (rows, tokens, k, n) = CASES[name]
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=kinds)
    placed = [jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in zip((X, W, A, B), specs, strict=True)]
    placed.append(jax.device_put(DY, NamedSharding(mesh, dy)))
    with reference_kernels.installed() as calls:
        got = jax.jit(run(None))(*placed, IDS)
        check(got)
        local = (rows * tokens, k, rows, R, n)
        # `run` is traced with whole operands as well.
        seen = {sizes for _, sizes in calls} - {(ROWS * TOKENS, K, ROWS, R, N)}
        assert seen == {local}, (name, seen)


def manual() -> None:
    """Inside `shard_map` a device has its row, and gradients of what all devices share are added up."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    shared, split = P(), P("d")
    ins, outs = (split, shared, shared, shared, split, split), (split, split, shared, shared, shared)
    for selection in ("fused", "gathered", "masked"):
        with reference_kernels.installed() as calls:
            mapped = jax.shard_map(run(selection), mesh=mesh, in_specs=ins, out_specs=outs)
            check(jax.jit(mapped)(X, W, A, B, DY, IDS))
            local = {(TOKENS, K, 1, R, N)} if selection == "fused" else set()
            assert {sizes for _, sizes in calls} == local, (selection, calls)
