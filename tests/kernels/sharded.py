"""Checks for a process with four devices: products split over a mesh, on `reference_kernels`, against one device."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import reference
from lora_jax.ops import lora_dot
from tests.core.harness import cast, normal
from tests.kernels import reference_kernels
from tests.kernels.problems import mask

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
F16, RATE, SCALE, KEY = np.float16, 0.25, 2.7, jax.random.key(2)
T, M, K, N, R = 4, 12, 256, 64, 3
X, W = cast(normal(T, M, K), F16), cast(normal(K, N), F16)
A, B = cast(normal(K, R) / 2, np.float32), cast(normal(R, N), np.float32)
BIAS = cast(10 * normal(N), np.float32)
DY = cast(normal(T, M, N, seed=3), F16)

# Specs of x, W, A, B and dy on a (2, 2) mesh; the rows, K and N of one device; the most that it may gather at once.
CASES = {
    "data": ((P("d"), P(), P(), P(), P("d")), (24, K, N), 0),
    "data, both axes": ((P(("d", "t")), P(), P(), P(), P(("d", "t"))), (12, K, N), 0),
    "sequence": ((P(None, "t"), P(), P(), P(), P(None, "t")), (24, K, N), 0),
    "batch and sequence": ((P("d", "t"), P(), P(), P(), P("d", "t")), (12, K, N), 0),
    "column": ((P("d"), P(None, "t"), P(), P(None, "t"), P("d", None, "t")), (24, K, N // 2), 0),
    "row": ((P("d", None, "t"), P("t"), P("t"), P(), P("d")), (24, K // 2, N), 0),
    "row, both axes": ((P(None, None, ("d", "t")), P(("d", "t")), P(("d", "t")), P(), P()), (T * M, K // 4, N), 0),
    "fully sharded": ((P(("d", "t")), P("d", "t"), P("d"), P(None, "t"), P(("d", "t"))), (12, K, N), K * N),
    "fully sharded, column": (
        (P("d"), P("d", "t"), P(), P(None, "t"), P("d", None, "t")), (24, K, N // 2), K * N // 2,
    ),
    # x is whole on every device, and so dx must be.
    "weight only": (
        (P(), P("d", "t"), P("d"), P(None, "t"), P(None, None, "t")), (T * M, K // 2, N // 2), T * M * K,
    ),
}  # fmt: skip
# A kernel that draws a mask is told a first row and a first column. Rows of one device that don't lie together have no
# first one, and columns must start at a multiple of 128.
APART = ("sequence", "batch and sequence", "row, both axes")


def case(name: str) -> tuple[Any, Any, int]:
    """As in `CASES`, with the bias before dy, split as the columns of W are."""
    (*specs, dy), local, most = CASES[name]
    return (*specs, P(*specs[1][1:]), dy), local, most


def keys(name: str) -> Iterator[Any]:
    """With dropout; where that leaves the kernels, without it as well, and for one case in which it does not."""
    yield KEY
    if name in (*APART, "fully sharded, column"):
        yield None


def product(key: Any) -> Any:
    """With dropout if there is a key."""

    def dot(x, w, a, b, bias):
        options = {"dropout_rate": RATE, "key": key, "implementation": "reference"}
        return lora_dot(x, w, a, b, bias=bias, scale=SCALE, **options)

    return dot


def run(key: Any) -> Any:
    """Value and gradients."""

    def fn(x, w, a, b, bias, dy):
        y, vjp = jax.vjp(lambda x, a, b, bias: product(key)(x, w, a, b, bias), x, a, b, bias)
        return y, vjp(dy)

    return fn


@functools.cache
def kept() -> np.ndarray:
    """The mask that `KEY` draws."""
    seed0, seed1 = map(int, jax.random.bits(KEY, (2,), jnp.uint32))
    return mask((T * M, K), round(RATE * 65536), (seed0, seed1)).reshape(T, M, K)


@functools.cache
def exact(dropped: bool, biases: int = 1) -> tuple[Any, Any]:
    """Result and gradients in float64, with magnitudes. `biases`: how often the bias is added."""
    keep = kept() if dropped else None
    gradients = reference.lora_dot_gradients(X, W, A, B, SCALE, DY, keep)
    return reference.lora_dot(X, W, A, B, SCALE, keep, biases * BIAS), [
        gradients[name] for name in ("x", "a", "b", "bias")
    ]


def check(got: Any, dropped: bool, biases: int = 1) -> None:
    """Within the roundings; without the adapter, the mask or a device's part it would not be."""
    (y, gradients), (want, wanted) = got, exact(dropped, biases)
    # A split sum is rounded once more, by each device.
    bound = 2 * reference.tolerance(F16, K + N + T * M)
    for value, (exactly, magnitude) in zip((y, *gradients), (want, *wanted), strict=False):
        value = np.asarray(jax.device_get(value))
        assert reference.excess(value, exactly, bound * magnitude) <= 1
        assert reference.excess(exactly * 0.5, exactly, bound * magnitude) > 1
    plain = reference.lora_dot(X, W, A, 0 * B, SCALE, bias=biases * BIAS)[0]
    assert reference.excess(plain, want[0], bound * want[1]) > 1
    for others in {0, 1, 2} - {biases}:  # a bias that no device adds, or that two add
        assert reference.excess(exact(dropped, others)[0][0], want[0], bound * want[1]) > 1
    if dropped:
        assert reference.excess(exact(False, biases)[0][0], want[0], bound * want[1]) > 1


def automatic(name: str) -> None:
    """Under `jit`: the kernels see one device's part, with its part of the mask; nothing is gathered but weights."""
    specs, local, most = case(name)
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AUTO, AUTO))
    operands = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip((X, W, A, B, BIAS, DY), specs, strict=True)]
    for key in keys(name):
        with reference_kernels.installed() as calls:
            x, _, *factors, dy = (v.sharding for v in operands)
            compiled = jax.jit(run(key), out_shardings=(dy, (x, *factors))).lower(*operands).compile()
        check(compiled(*operands), key is not None)
        # Traced on whole operands for the types of the results, and then on parts.
        parts = [(kind, shapes[:3]) for kind, shapes in calls if shapes[:3] != (T * M, K, N)]
        on_xla = key is not None and name in APART
        assert set(parts) == (set() if on_xla else {("forward", local), ("backward", local)}), calls
        text = compiled.as_text()
        gathered = [
            np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\[([\d,]+)\]\S* all-gather\(", text)
        ]
        assert max(gathered, default=0) <= most, (name, gathered)


def explicit(name: str) -> None:
    """The split is in the types: the same results, with gradients of the types of their operands."""
    specs, local, _ = case(name)
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(EXPLICIT, EXPLICIT))
    with jax.set_mesh(mesh):
        operands = [jax.device_put(v, s) for v, s in zip((X, W, A, B, BIAS), specs[:5], strict=True)]
        for key in keys(name):
            with reference_kernels.installed() as calls:
                # The type of the result, which is that of `dy` too, takes no compilation.
                y = jax.eval_shape(product(key), *operands)
                dy = jax.device_put(DY, NamedSharding(mesh, y.sharding.spec))
                got = jax.jit(run(key))(*operands, dy)
                for gradient, operand in zip(got[1], (operands[0], *operands[2:]), strict=True):
                    assert jax.typeof(gradient).sharding == jax.typeof(operand).sharding
            check(got, key is not None)
            on_xla = key is not None and name in APART
            assert {shapes[:3] for _, shapes in calls} == (set() if on_xla else {local}), calls


def manual() -> None:
    """Inside `shard_map` what is seen is the part: kernels on it, gradients that vary as their operands do."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AUTO,))
    ins = (P("d"), P(), P(), P(), P("d"))
    with reference_kernels.installed() as calls:

        def loss(x, a, b, w, dy):
            y = lora_dot(x, w, a, b, scale=SCALE, implementation="reference")
            return jax.lax.psum((y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(), "d")

        mapped = jax.shard_map(loss, mesh=mesh, in_specs=(P("d"), P(), P(), P(), P("d")), out_specs=P())
        gradients = jax.jit(jax.grad(mapped, argnums=(0, 1, 2)))(X, A, B, W, DY)
        forward = jax.shard_map(
            lambda x, w, a, b, dy: lora_dot(x, w, a, b, scale=SCALE, implementation="reference"),
            mesh=mesh, in_specs=ins, out_specs=P("d"),
        )  # fmt: skip
        y = jax.jit(forward)(X, W, A, B, DY)
        assert {shapes[:3] for _, shapes in calls} == {(M, K, N)}, calls
    check((y, gradients), dropped=False, biases=0)


def no_names() -> None:
    """Devices that no mesh names: an error that says so, and no copies on every device."""
    from jax._src.sharding_impls import GSPMDSharding

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AUTO,))

    def unnamed(x, spec):
        return jax.device_put(
            x, GSPMDSharding(tuple(mesh.devices.flat), NamedSharding(mesh, spec)._to_xla_hlo_sharding(x.ndim))
        )

    operands = [unnamed(v, P("d") if v is X else P()) for v in (X, W, A, B)]
    with reference_kernels.installed():
        try:
            jax.jit(lambda *v: lora_dot(*v, implementation="reference"))(*operands)
        except Exception as error:
            assert "shardings with named mesh axes" in str(error), error
        else:
            raise AssertionError("no error")


def lowered_for_cuda() -> None:
    """The program for a GPU: under `jit` one call that the partitioner will split; inside `shard_map` the parts."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AUTO,))
    structs = [
        jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, P("d") if v is X else P()))
        for v in (X, W, A, B)
    ]

    def dot(x, w, a, b):
        return lora_dot(x, w, a, b, implementation="reference")

    mapped = jax.shard_map(dot, mesh=mesh, in_specs=(P("d"), P(), P(), P()), out_specs=P("d"))
    with reference_kernels.installed(platform="cuda"), reference_kernels.pretending("NVIDIA H200"):
        text = jax.jit(dot).trace(*structs).lower(lowering_platforms=("cuda",)).as_text()
        assert "@CustomSPMDPartitioning" in text and "sdy.sharding_rule" in text
        assert "dot_general" not in text.split("@CustomSPMDPartitioning")[1].split("\n")[0]
        text = jax.jit(mapped).trace(*structs).lower(lowering_platforms=("cuda",)).as_text()
        assert "@CustomSPMDPartitioning" not in text and f"tensor<{M}x{K}xf32>" in text
        assert f"tensor<{T * M}x{K}xf32>" not in text and "all_gather" not in text
        text = jax.jit(mapped).trace(*structs).lower(lowering_platforms=("cpu",)).as_text()
        assert f"tensor<{M}x{K}xf32>" not in text  # XLA's path on any other platform
