"""Each Triton kernel alone, launched from JAX, with the tiles that ship and with every candidate.

For `benchmarks/kernels.py --implementation triton`, which says how it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from benchmarks.timing import Chain
from lora_jax import _compat
from lora_jax.kernels import triton_configs, triton_lora
from lora_jax.kernels import triton_plans as plans
from lora_jax.kernels.triton_plans import Matrix


def chains(
    xs: list[Any], dys: list[Any], w: Any, a: Any, b: Any, seed: Any, threshold: int
) -> tuple[list[Chain], dict[str, tuple[float, float]]]:
    """What to time, and by its name the flops and the bytes of the large operand."""
    (m, k), (r, n) = xs[0].shape, b.shape
    h, g = xs[0] @ a, dys[0] @ b.T
    device = _compat.target_device()
    sms, shared = device.multiprocessors or 132, triton_configs.SHARED_BYTES.get(device.capability or (0, 0), 99 * 1024)
    x_lies, dy_lies, w_lies = lies(m, k), lies(m, n), lies(k, n)
    thin, a_lies, b_lies = lies(m, r), lies(k, r), lies(r, n)
    found: list[Chain] = []
    work: dict[str, tuple[float, float]] = {}

    def add(row: str, plan: Any, inputs: list[Any], rest: tuple[Any, ...], run: Callable[..., Any]) -> None:
        row += f", {plan.warps} warps, {plan.stages} stages, " + tiles(plan)
        if row not in work:
            found.append(Chain(row, lambda *v: run(plan, *v), [(each,) for each in inputs], rest))
            wide = plan.kernel == "gemm"
            width = k if inputs is xs else n
            work[row] = (2.0 * m * k * n, 0) if wide else (2.0 * m * width * r, 2.0 * m * width)

    def gemm(plan: Any, x: Any, w: Any, h: Any, b: Any, seed: Any = None) -> Any:
        out = jax.ShapeDtypeStruct((m, plan.numbers["N"]), x.dtype)
        return triton_lora._run(plan, out, x_ptr=x, w_ptr=w, h_ptr=h, b_ptr=b, seed_ptr=seed)

    def down(plan: Any, x: Any, a: Any, seed: Any = None) -> Any:
        return triton_lora._run(plan, jax.ShapeDtypeStruct((m, r), x.dtype), x_ptr=x, a_ptr=a, seed_ptr=seed)

    def outer(plan: Any, x: Any, g: Any, seed: Any = None) -> Any:
        out = jax.ShapeDtypeStruct((plan.numbers["C"], r), "float32")
        return triton_lora._run(plan, out, t_ptr=g, v_ptr=x, seed_ptr=seed)

    for config in (None, *(each for each in triton_configs.GEMM if ring_bytes(each) < shared)):
        more = {"shared": shared, "config": config}
        plan = plans.gemm(x_lies, w_lies, thin, b_lies, dy_lies, 0, sms, **more)
        add("gemm", plan, xs, (w, h, b), gemm)
        for name, cut, rest in (("", 0, (w, g, a)), (", dropout", threshold, (w, g, a, seed))):
            plan = plans.gemm(dy_lies, w_lies.T, thin, a_lies.T, x_lies, cut, sms, **more)
            add("gemm, input gradient" + name, plan, dys, rest, gemm)
    for config in (None, *(each for each in triton_configs.DOWN if not each.tma)):
        add("down dy", plans.down(dy_lies, b_lies.T, 1.0, 0, sms, config=config), dys, (b,), down)
        for name, cut, rest in (("", 0, (a,)), (", dropout", threshold, (a, seed))):
            add("down x" + name, plans.down(x_lies, a_lies, 1.0, cut, sms, config=config), xs, rest, down)
    for config in (None, *(each for each in triton_configs.OUTER if not each.tma)):
        for name, cut, rest in (("", 0, (g,)), (", dropout", threshold, (g, seed))):
            plan = plans.outer(thin, x_lies, cut, sms, transposed=True, config=config)
            add("outer x" + name, plan, xs, rest, outer)
    return found, work


def ring_bytes(config: triton_configs.GemmConfig) -> int:
    return 2 * config.stages * config.bk * (config.bm + config.bn)


def lies(rows: int, columns: int) -> Matrix:
    return Matrix.row_major(rows, columns, 2)


def tiles(plan: Any) -> str:
    sizes = "x".join(str(plan.numbers[name]) for name in ("BM", "BN", "BC", "BK") if name in plan.numbers)
    return f"{sizes}, {plan.programs} programs"
