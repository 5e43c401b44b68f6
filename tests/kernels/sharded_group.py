"""Checks for a process with four devices: products that share `x` split over a mesh, on `reference_group`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from lora_jax import reference
from lora_jax.ops import lora_dot_group
from tests.core.harness import cast, normal
from tests.kernels import reference_kernels, sharded
from tests.kernels.sharded import AUTO, EXPLICIT, F16, KEY, RATE, SCALE, A, K, M, T, X

# The second is a third as wide as the first, as a key beside a query is; the third can't be split over both axes.
NS = (48, 16, 6)
WS = [cast(normal(K, n, seed=i), F16) for i, n in enumerate(NS)]
BS = [cast(normal(3, n, seed=i), np.float32) for i, n in enumerate(NS)]
AS = [A, A[:, :2], cast(normal(K, 3, seed=9) / 2, np.float32)]
BS[1] = BS[1][:2]
BIASES = [cast(10 * normal(n), np.float32) for n in NS]
DYS = [cast(normal(T, M, n, seed=3), F16) for n in NS]
# Rows and K of one device, and by how much N is split; specs as those of a single product.
CASES = {
    "data": (24, K, 1),
    "column": (24, K, 2),
    "row": (24, K // 2, 1),
    "row, both axes": (T * M, K // 4, 1),
    "fully sharded": (12, K, 1),
    "weight only": (T * M, K // 2, 2),
}


def run(key: Any) -> Any:
    def fn(x, ws, a_s, b_s, biases, dys):
        def group(x, a_s, b_s, biases):
            options = {"dropout_rate": RATE, "key": key, "implementation": "reference"}
            return lora_dot_group(x, ws, a_s, b_s, biases=biases, scale=SCALE, **options)

        ys, vjp = jax.vjp(group, x, a_s, b_s, biases)
        return ys, vjp(tuple(dys))

    return fn


def check(got: Any, dropped: bool) -> None:
    """Within the roundings; without a layer, a device's part or a bias, or with two of them, it would not be."""
    mask = sharded.kept() if dropped else None
    ys, (dx, *lists) = jax.device_get(got)
    bound = 2 * reference.tolerance(F16, K + sum(NS) + T * M)
    total, magnitude = 0.0, 0.0
    each = zip(ys, zip(*lists, strict=True), WS, AS, BS, BIASES, DYS, strict=True)
    for y, gradients, w, a, b, bias, dy in each:
        want = reference.lora_dot(X, w, a, b, SCALE, mask, bias)
        assert reference.excess(y, want[0], bound * want[1]) <= 1
        for wrong in (want[0] - bias, want[0] + bias, reference.lora_dot(X, w, a, 0 * b, SCALE, mask, bias)[0]):
            assert reference.excess(wrong, want[0], bound * want[1]) > 1
        wanted = reference.lora_dot_gradients(X, w, a, b, SCALE, dy, mask)
        for value, (exactly, size) in zip(gradients, (wanted[name] for name in ("a", "b", "bias")), strict=True):
            assert (
                reference.excess(value, exactly, bound * size)
                <= 1
                < reference.excess(exactly / 2, exactly, bound * size)
            )
        total, magnitude = total + wanted["x"][0], magnitude + wanted["x"][1]
    assert reference.excess(dx, total, bound * magnitude) <= 1
    assert reference.excess(total - wanted["x"][0], total, bound * magnitude) > 1


def operands(name: str, put: Any) -> list[Any]:
    (x, w, a, b, bias, dy), _, _ = sharded.case(name)
    lists = [(X, x), (WS, w), (AS, a), (BS, b), (BIASES, bias), (DYS, dy)]
    return [[put(v, spec) for v in values] if isinstance(values, list) else put(values, spec) for values, spec in lists]


def keys(name: str) -> Iterator[Any]:
    """With dropout; where that leaves the kernels, without it as well, and for one case in which it does not."""
    yield KEY
    if name in (*sharded.APART, "column"):
        yield None


def expected(name: str, dropped: bool, calls: Any) -> bool:
    rows, k, parts = CASES[name]
    local = (rows, k, *(n // parts for n in NS))
    seen = {sizes for _, sizes in calls if sizes != (T * M, K, *NS)}
    return seen == (set() if dropped and name in sharded.APART else {local})


def automatic(name: str) -> None:
    """Under `jit`, with results split as operands are."""
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AUTO, AUTO))
    given = operands(name, lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec)))
    for key in keys(name):
        with reference_kernels.installed() as calls:
            x, _, *factors, dys = jax.tree.map(lambda v: v.sharding, given)
            compiled = jax.jit(run(key), out_shardings=(tuple(dys), (x, *factors))).lower(*given).compile()
        check(compiled(*given), key is not None)
        assert expected(name, key is not None, calls), calls


def explicit(name: str) -> None:
    """The split is in the types; gradients have their operands' types."""
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(EXPLICIT, EXPLICIT))
    with jax.set_mesh(mesh):
        given = operands(name, jax.device_put)
        options = {"biases": given[4], "scale": SCALE, "implementation": "reference"}
        with reference_kernels.installed():
            ys = jax.eval_shape(lambda *v: lora_dot_group(*v, **options), *given[:4])
        given[5] = [jax.device_put(dy, y.sharding.spec) for dy, y in zip(DYS, ys, strict=True)]
        for key in keys(name):
            with reference_kernels.installed() as calls:
                got = jax.jit(run(key))(*given)
                pairs = zip(jax.tree.leaves(got[1]), jax.tree.leaves((given[0], *given[2:5])), strict=True)
                assert all(jax.typeof(g).sharding == jax.typeof(v).sharding for g, v in pairs)
            check(got, key is not None)
            assert expected(name, key is not None, calls), calls
