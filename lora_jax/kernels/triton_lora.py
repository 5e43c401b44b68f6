"""Ampere, Ada, Hopper: `y = x·W + drop(x)·A·B (+ bias)` and its derivative, by the Triton kernels through jax-triton.

Forward, two launches: `h = drop(x)·A`, then the product with its tail. Backward, four: `g = dy·Bᵀ`, the product
`dy·Wᵀ + mask·(g·Aᵀ)`, `dA = drop(x)ᵀ·g`, `dB = hᵀ·dy`. A sum that is split is added up by one more each. Operands go by
pointers and strides: nothing is padded, and nothing is transposed in memory.

This is the one file that knows of jax-triton, 0.3 and 0.4. Everything but the pointers is a constant of the compiled
kernel: shapes are fixed in a JAX program anyway, and of a number that comes at run time jax-triton does not tell the
compiler what it is a multiple of, without which memory is read element by element.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import types
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import _compat
from lora_jax.kernels import triton_plans as plans
from lora_jax.kernels import tuned
from lora_jax.kernels.linear import Drop as Drop
from lora_jax.kernels.linear import Wants as Wants
from lora_jax.kernels.triton_configs import LEAST_SHARED_BYTES, SHARED_BYTES
from lora_jax.kernels.triton_plans import Launch, Matrix

# While it is imported, jax-triton empties this variable or removes it; empty, it keeps everybody else in the process,
# PyTorch for one, from starting any kernel of Triton's.
_VARIABLE = "TRITON_CACHE_DIR"
_before = os.environ.get(_VARIABLE)
try:
    import jax_triton  # pyright: ignore[reportMissingImports]
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ImportError(f"{error}; install `lora-jax[triton]`, beside a jax for CUDA") from error
finally:
    os.environ.pop(_VARIABLE, None)
    if _before is not None:
        os.environ[_VARIABLE] = _before

# 0.4 warns about the name that 0.3 has.
_RESULT = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
_TYPICAL_SMS = 108  # where a device does not say how many it has: sums are then split more or less than is best


def unsupported(m: int, k: int, n: int, rank: int, dtype: Any) -> str | None:
    """Why the kernels can't compute these sizes, or None."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype).name} operands; the kernels take bfloat16 and float16"
    if not 1 <= rank <= 256:
        return f"rank {rank}; the kernels take 1 to 256"
    if 0 in (m, k, n):
        return f"M={m}, K={k}, N={n}: nothing to compute"
    if max(k, n) * rank >= 2**31:
        return f"a factor of {max(k, n)} x {rank} elements, which the kernels count in 31 bits"
    return None


def slower(m: int, k: int, n: int, rank: int, dtype: Any, dropped: bool, device_kind: str) -> str | None:
    """Why XLA is the better choice for these sizes, although the kernels could compute them, or None."""
    try:
        return tuned.slower("triton", m, k, n, rank, dropped, device_kind)
    except LookupError:
        return f'nobody has timed these kernels on {device_kind} yet: ask for them by name, implementation="triton"'


def faster(m: int, k: int, n: int, rank: int, dropped: bool, device_kind: str) -> str:
    """What says that they are the better choice, where `slower` says nothing."""
    return tuned.faster("triton", m, k, n, rank, dropped, device_kind)


def h_layout(rank: int) -> tuple[bool, int]:
    """`h` is (M, R), without padding."""
    return False, rank


def forward(
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    drop: Drop | None = None,
    *,
    transposed: bool = False,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`x·w + drop(x)·a·b`: (M, K), (K, N) or (N, K) if `transposed`, (K, R), (R, N) -> (M, N), and `h` for `backward`.

    All of one dtype, bfloat16 or float16, which `h` and the result are rounded to once each. `bias`: (N,), of that
    dtype or float32, added before the result is rounded.
    """
    h = _down(x, a, _lies(a), drop)
    y = jax.ShapeDtypeStruct((x.shape[0], b.shape[1]), x.dtype)
    weight = _lies(w).T if transposed else _lies(w)
    plan = _gemm(_lies(x), weight, _lies(h), _lies(b), _lies(y), 0, bias=bias is not None)
    return _run(plan, y, x_ptr=x, w_ptr=w, h_ptr=h, b_ptr=b, bias_ptr=bias), h


def backward(
    dy: jax.Array,
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    h: jax.Array,
    drop: Drop | None = None,
    *,
    transposed: bool = False,
    wants: Wants = Wants(),  # noqa: B008
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Gradients of `forward`: of `x` in its dtype, of `a` and `b` in float32, or None where not wanted."""
    threshold, seed = (drop.threshold, drop.seed) if drop else (0, None)
    dx = da = db = None
    if wants.x or wants.a:
        g = _down(dy, b, _lies(b).T, None)
        if wants.x:
            weight = _lies(w) if transposed else _lies(w).T
            plan = _gemm(_lies(dy), weight, _lies(g), _lies(a).T, _lies(x), threshold)
            dx = _run(plan, x, x_ptr=dy, w_ptr=w, h_ptr=g, b_ptr=a, seed_ptr=seed)
        if wants.a:
            plan = plans.outer(_lies(g), _lies(x), threshold, _sms(), transposed=True)
            da = _run(plan, _float32(a.shape), t_ptr=g, v_ptr=x, seed_ptr=seed)
    if wants.b:
        plan = plans.outer(_lies(h), _lies(dy), 0, _sms())
        db = _run(plan, _float32(b.shape), t_ptr=h, v_ptr=dy)
    return dx, da, db


def _down(x: jax.Array, factor: jax.Array, lies: Matrix, drop: Drop | None) -> jax.Array:
    """`drop(x)` times the factor, which is to be seen as `lies`."""
    threshold, seed = (drop.threshold, drop.seed) if drop else (0, None)
    plan = plans.down(_lies(x), lies, 1.0, threshold, _sms())
    h = jax.ShapeDtypeStruct((x.shape[0], lies.shape[1]), x.dtype)
    return _run(plan, h, x_ptr=x, a_ptr=factor, seed_ptr=seed)


def _gemm(x: Matrix, w: Matrix, h: Matrix, b: Matrix, y: Matrix, threshold: int, *, bias: bool = False) -> Launch:
    capability = _compat.target_device().capability or (0, 0)
    shared = SHARED_BYTES.get(capability, LEAST_SHARED_BYTES)
    return plans.gemm(x, w, h, b, y, threshold, _sms(), bias=bias, shared=shared)


def _run(plan: Launch, out: Any, **operands: jax.Array | None) -> jax.Array:
    """Carries out a plan, partial sums included. `out` has the result's shape and dtype; `operands` by pointer."""
    given = {name: value for name, value in operands.items() if value is not None}
    if plan.parts == 1:
        return _launch(plan, jax.ShapeDtypeStruct(out.shape, out.dtype), given)
    parts = _launch(plan, _float32((plan.parts, *out.shape)), given)
    return _run(plans.total(parts.size // plan.parts, plan.parts), out, parts_ptr=parts)


def _launch(plan: Launch, out: jax.ShapeDtypeStruct, operands: dict[str, jax.Array]) -> jax.Array:
    kernel, pointers = _kernel(plan.kernel)
    assert pointers[-1] == plan.out, "jax-triton 0.3 puts the result behind the other arrays"
    # What is not read must be something all the same: jax-triton 0.3 takes no None.
    anything = next(iter(operands.values()))
    capability = _compat.target_device().capability
    return jax_triton.triton_call(
        *(operands.get(name, anything) for name in pointers[:-1]),
        kernel=kernel,
        grid=(plan.programs,),
        num_warps=plan.warps,
        num_stages=plan.stages,
        # Where it is not known here, jax-triton asks the device that the program is lowered for.
        compute_capability=None if capability is None else 10 * capability[0] + capability[1],
        name=f"lora_{plan.kernel}",
        **{_RESULT: out},
        **plan.numbers,
    )


@functools.cache
def _kernel(name: str) -> tuple[Any, list[str]]:
    """A kernel with all its numbers declared as constants, and the names of its pointers."""
    function = getattr(importlib.import_module(f"lora_jax.kernels.triton_{name}"), f"{name}_kernel").fn
    parameters = list(inspect.signature(function).parameters)
    pointers = [each for each in parameters if each.endswith("_ptr")]
    assert parameters[: len(pointers)] == pointers, parameters
    same = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    same.__annotations__ = dict.fromkeys(parameters[len(pointers) :], tl.constexpr)
    return triton.jit(same), pointers


def _lies(x: Any) -> Matrix:
    """By pointers: jax-triton 0.3 has no descriptors."""
    rows, columns = x.shape
    return Matrix.row_major(rows, columns, x.dtype.itemsize)


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _sms() -> int:
    return _compat.target_device().multiprocessors or _TYPICAL_SMS
