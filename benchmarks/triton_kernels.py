"""Checks the Triton kernels on a GPU against float64, then times and tunes them against the frozen linear.

    PYTHONPATH=.:interop python3 benchmarks/triton_kernels.py [--quick] [--json FILE] [--workers 12]

Needs torch and triton. `--quick` stops after the checks. One JSON line
per figure goes to FILE (or to the standard output), a table comes last. Times are medians of `triton.testing.do_bench`
(it empties the L2 cache before every call) over rotating inputs; ratios are to the frozen linear in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton
import triton.testing

from lora_jax.kernels import triton_configs as configs
from lora_torch import triton_launch as launch
from lora_torch import triton_product

SHAPES = [
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 64),
    (16384, 8192, 8192, 64),
    (2048, 2048, 8192, 16),
]
# Odd sizes go by pointers, multiples of 8 by descriptors; both cross the edges of tiles.
SIZES = [
    (1, 16, 16, 1),
    (33, 45, 70, 5),
    (257, 513, 129, 16),
    (256, 512, 384, 16),
    (300, 520, 264, 8),
    (1000, 1032, 776, 64),
    (129, 264, 520, 128),
    (200, 136, 264, 256),
    (2048, 2064, 2056, 32),
]
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SEED = (0xDEADBEEF, 0x12345678)
out_file = sys.stdout


def say(**fields: Any) -> None:
    print(json.dumps(fields), file=out_file, flush=True)


def mask(m: int, k: int, rate: float) -> torch.Tensor:
    """0 or 1 / (1 - rate), float64: the definition of `triton_dropout` in 64-bit integers."""

    def fmix(v):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            v = ((v ^ (v >> shift)) * factor) & 0xFFFFFFFF
        return v ^ (v >> 16)

    i, j = torch.arange(m, device="cuda")[:, None], torch.arange(k, device="cuda")[None]
    key = (i * 0x9E3779B9 + SEED[1]) & 0xFFFFFFFF
    v = (((j >> 7 << 6) | (j & 63)) * 0x85EBCA6B + SEED[0]) & 0xFFFFFFFF
    # Products modulo 2**64 are right modulo 2**32, signed or not.
    word = ((fmix(key) | 1) * (((v ^ (v >> 16)) * 0xC2B2AE35 & 0xFFFFFFFF) | 1) + key) & 0xFFFFFFFF
    factor = torch.where((j & 64) != 0, 0x27D4EB2F, 0xC2B2AE35)
    bits = (((word ^ (word >> 16)) * factor & 0xFFFFFFFF) >> 16) ^ 0x8000
    threshold = round(rate * 65536)
    return (bits >= threshold).double() * (65536 / (65536 - threshold))


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights lie as PyTorch stores them. `h` and `g` are drawn, so that each kernel is judged by itself."""
    m, k, n, r = shape
    generator = torch.Generator("cuda").manual_seed(m * k + n * r)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, device="cuda") * std).to(dtype)

    return {
        "x": normal(m, k),
        "w": normal(n, k, std=k**-0.5).T,
        "a": normal(r, k, std=k**-0.5).T,
        "b": normal(n, r).T,
        "dy": normal(m, n),
        "h": normal(m, r),
        "g": normal(m, r),
        "bias": normal(n),
    }


def excess(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> float:
    """The worst |got - want| / bound: at most 1 if `got` is right, infinite for NaN."""
    ratio = (got.double() - want).abs() / bound
    return float(torch.where(ratio.isnan(), torch.inf, ratio).max())


def check(shape: tuple[int, int, int, int], dtype: torch.dtype, rate: float, over: dict[str, Any]) -> dict[str, Any]:
    """Every kernel on one problem. `over`: configurations by the name of the call. Outputs start as NaN."""
    v = inputs(shape, dtype)
    drop = launch.Drop.seeded(rate, SEED, "cuda") if rate else None
    keep = mask(shape[0], shape[1], rate)
    d = {name: value.double() for name, value in v.items()}
    s = 0.625
    x, w, a, b, dy, h, g, bias = (v[name] for name in ("x", "w", "a", "b", "dy", "h", "g", "bias"))
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` returns with NaN
    found = {
        "h": launch.down(x, a, s, drop, config=over.get("down")),
        "g": launch.down(dy, b.T, s, config=over.get("down")),
        "y": launch.forward(x, w, h, b, bias, config=over.get("gemm")),
        "y plain": launch.forward(x, w.contiguous(), h, b, config=over.get("gemm")),
        "dx": launch.input_gradient(dy, w, g, a, drop, config=over.get("gemm")),
        "da": launch.outer(g, x, drop, config=over.get("outer")).T,
        "db": launch.outer(h, dy, config=over.get("outer")),
    }

    torch.use_deterministic_algorithms(False)

    def formulas(d: dict[str, torch.Tensor], s: float, keep: torch.Tensor, lora: float) -> dict[str, torch.Tensor]:
        return {
            "h": s * (d["x"] * keep) @ d["a"],
            "g": s * d["dy"] @ d["b"].T,
            "y": d["x"] @ d["w"] + lora * d["h"] @ d["b"] + d["bias"],
            "y plain": d["x"] @ d["w"] + lora * d["h"] @ d["b"],
            "dx": d["dy"] @ d["w"].T + lora * keep * (d["g"] @ d["a"].T),
            "da": (d["x"] * keep).T @ d["g"],
            "db": d["h"].T @ d["dy"],
        }

    want = formulas(d, s, keep, 1.0)
    size = formulas({name: value.abs() for name, value in d.items()}, s, keep, 1.0)
    # Each of these is the same call gone wrong, and must break the bound: adapter dropped, or not scaled.
    wrong = formulas(d, 1.0, keep, 0.0)
    for name in ("da", "db"):
        wrong[name] = want[name] * s
    m, k, n, r = shape
    terms = {"h": k, "g": n, "y": k + r, "y plain": k + r, "dx": n + r, "da": m, "db": m}
    worst, caught = 0.0, True
    for name, got in found.items():
        rounding = ROUNDOFF[torch.float32 if got.dtype == torch.float32 else dtype]
        bound = rounding * want[name].abs() * 1.01 + (terms[name] + 4) * 2.0**-24 * size[name] + 1e-30
        if dtype == torch.float16:
            bound += 2.0**-25  # below the smallest normal number, roundings have an absolute size
        ratio = excess(got, want[name], bound)
        worst = max(worst, ratio)
        caught &= excess(wrong[name], want[name], bound) > 1
        if ratio > 1:
            say(section="check", shape=shape, dtype=str(dtype), rate=rate, over=str(over), wrong=name, excess=ratio)
    return {"excess": worst, "catches": caught}


def cases() -> list[tuple[Any, ...]]:
    found = [(size, torch.bfloat16, rate, {}) for size in SIZES for rate in (0.0, 0.3)]
    for dtype in (torch.float32, torch.float16):
        found += [(size, dtype, rate, {}) for size in (SIZES[1], SIZES[3], SIZES[5]) for rate in (0.0, 0.3)]
    for kind, table in (("gemm", configs.GEMM), ("down", configs.DOWN), ("outer", configs.OUTER)):
        for config in table:
            found += [((520, 776, 1032, r), torch.bfloat16, rate, {kind: config}) for r, rate in ((16, 0.0), (64, 0.3))]
    return found


def checked(case: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`check` in a worker process: an error is a result. A candidate that needs too much memory is not wrong."""
    try:
        return case, check(*case)
    except triton.runtime.errors.OutOfResources as error:
        return case, {"excess": 0.0 if case[3] else 2.0, "catches": True, "does not fit": str(error)[:100]}
    except Exception as error:
        return case, {"error": f"{type(error).__name__}: {str(error)[:400]}"}


def calls(shape: tuple[int, int, int, int], sets: list[dict[str, torch.Tensor]], rate: float = 0.0) -> dict[str, Any]:
    """name -> (table of configurations, function of a configuration, bytes, flops): the six calls of a layer."""
    m, k, n, r = shape
    drop = launch.Drop.seeded(rate, SEED, "cuda") if rate else None
    turn = itertools.cycle(sets)

    def call(function, *names, **more):
        def run(config):
            v = next(turn)
            return function(*(v[name] for name in names), config=config, **more)

        return run

    def transposed(config):
        v = next(turn)
        return launch.down(v["dy"], v["b"].T, 2.0, config=config)

    return {
        "forward": (configs.GEMM, call(launch.forward, "x", "w", "h", "b"), 0, 2 * m * n * (k + r)),
        "dx": (configs.GEMM, call(launch.input_gradient, "dy", "w", "g", "a", drop=drop), 0, 2 * m * k * (n + r)),
        "h": (configs.DOWN, call(launch.down, "x", "a", drop=drop), 2 * m * k, 0),
        "g": (configs.DOWN, transposed, 2 * m * n, 0),
        "da": (configs.OUTER, call(launch.outer, "g", "x", drop=drop), 2 * m * k, 0),
        "db": (configs.OUTER, call(launch.outer, "h", "dy"), 2 * m * n, 0),
    }


def compile_one(task: tuple[tuple[int, int, int, int], float, str, Any]) -> str | None:
    """Runs one call once in a worker process, so that the compiled kernel is in Triton's cache."""
    shape, rate, name, config = task
    try:
        calls(shape, [inputs(shape, torch.bfloat16)], rate)[name][1](config)
        torch.cuda.synchronize()
        return None
    except Exception as error:
        return f"{name} {config}: {type(error).__name__}: {str(error)[:200]}"


def bench(function, ms: int = 40) -> float:
    """Median microseconds."""
    return 1e3 * triton.testing.do_bench(function, warmup=10, rep=ms, return_mode="median")


class Ours(torch.autograd.Function):
    """`y = x @ w.T + s * drop(x) @ a.T @ b.T`, weights as PyTorch stores them, `w` frozen.

    The products of full size as layers have them, which leave `triton_gemm` to JAX.
    """

    @staticmethod
    def forward(ctx, x, w, a, b, s, drop, best):
        h = launch.down(x, a.T, s, drop, config=best.get("h"))
        ctx.save_for_backward(x, w, a, b, h)
        ctx.rest = s, drop, best
        return triton_product.product(x, w, h, b, transposed=True)

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b, h = ctx.saved_tensors
        s, drop, best = ctx.rest
        g = launch.down(dy, b, s, config=best.get("g"))
        db = launch.outer(h, dy, config=best.get("db")).T
        dx = triton_product.product(dy, w, g, a, None, drop)
        da = launch.outer(g, x, drop, config=best.get("da"))
        return dx, None, da.to(a.dtype), db.to(b.dtype), None, None, None


class Addmm(torch.autograd.Function):
    """The same by library products that add into their output: no separate addition, no kernel of our own."""

    @staticmethod
    def forward(ctx, x, w, a, b, s):
        h = x @ a.T
        ctx.save_for_backward(x, w, a, b, h)
        ctx.s = s
        return (x @ w.T).addmm_(h, b.T, alpha=s)

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b, h = ctx.saved_tensors
        g = (dy @ b).mul_(ctx.s)
        return (dy @ w).addmm_(g, a), None, g.T @ x, (dy.T @ h).mul_(ctx.s), None


def whole(shape: tuple[int, int, int, int], best: dict[str, Any], best_drop: dict[str, Any]) -> dict[str, float]:
    """Microseconds of whole layers, forward and forward + backward."""
    m, k, n, r = shape
    linear = torch.nn.functional.linear
    sets = []
    for _ in range(3):
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        a = (torch.randn(r, k, device="cuda", dtype=torch.bfloat16) * k**-0.5).requires_grad_()
        b = torch.randn(n, r, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        sets.append((x, w, a, b, torch.randn(m, n, device="cuda", dtype=torch.bfloat16)))
    turn = itertools.cycle(sets)
    drop = launch.Drop.seeded(0.1, SEED, "cuda")
    layers = {
        "frozen": lambda x, w, a, b: linear(x, w),
        "peft": lambda x, w, a, b: linear(x, w) + linear(linear(x, a), b) * 2.0,
        "addmm": lambda x, w, a, b: Addmm.apply(x, w, a, b, 2.0),
        "ours": lambda x, w, a, b: Ours.apply(x, w, a, b, 2.0, None, best),
        "peft dropout": lambda x, w, a, b: linear(x, w) + linear(linear(torch.dropout(x, 0.1, True), a), b) * 2.0,
        "ours dropout": lambda x, w, a, b: Ours.apply(x, w, a, b, 2.0, drop, best_drop),
        "frozen again": lambda x, w, a, b: linear(x, w),
    }
    times = {}
    for name, layer in layers.items():

        def forward(layer=layer):
            x, w, a, b, _ = next(turn)
            with torch.no_grad():
                return layer(x, w, a, b)

        def both(layer=layer, trained="frozen" not in name):
            x, w, a, b, dy = next(turn)
            return torch.autograd.grad(layer(x, w, a, b), [x, a, b] if trained else [x], dy)

        for kind, function in (("f", forward), ("f+b", both)):
            try:
                times[f"{name} {kind}"] = bench(function, 100)
            except Exception:
                traceback.print_exc()
        if m <= 2048 and name in ("frozen", "ours", "addmm"):
            try:  # without the time that Python takes to launch
                graph = 1e3 * triton.testing.do_bench_cudagraph(both, rep=50, return_mode="median")
                times[f"{name} f+b graph"] = graph
            except Exception:
                traceback.print_exc()
    return times


def tune(shape: tuple[int, int, int, int], rate: float) -> dict[str, Any]:
    """The fastest configuration of each call of a layer."""
    best = {}
    for name, (table, run, moved, flops) in calls(
        shape, [inputs(shape, torch.bfloat16) for _ in range(2)], rate
    ).items():
        seen = {}
        for config in table:
            try:
                seen[config] = us = bench(lambda run=run, config=config: run(config))
            except Exception as error:
                say(section="tune", shape=shape, call=name, config=str(config), error=str(error)[:200])
                continue
            speed = {"TB/s": round(moved / us / 1e6, 3)} if moved else {"TFLOP/s": round(flops / us / 1e6, 1)}
            say(section="tune", shape=shape, rate=rate, call=name, config=str(config), us=round(us, 2), **speed)
        if seen:
            best[name] = min(seen, key=seen.__getitem__)
    return best


def main() -> int:
    global out_file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only check")
    parser.add_argument("--json", help="where the JSON lines go")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=230, help="start no new section after this")
    arguments = parser.parse_args()
    if arguments.json:
        out_file = open(arguments.json, "w")  # noqa: SIM115 - until the end
    began = time.time()
    name = torch.cuda.get_device_name()
    say(section="machine", gpu=name, torch=torch.__version__, triton=triton.__version__)
    pool = ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn"))

    bad = 0
    for case, result in pool.map(checked, cases()):
        fine = result.get("excess", 2.0) <= 1 and result["catches"]
        bad += not fine
        size, dtype, rate, over = case
        say(section="check", shape=size, dtype=str(dtype), rate=rate, over=str(over), fine=fine, **result)
        if not fine:
            print(f"WRONG {size} {dtype} rate {rate} {over}: {result}", flush=True)
    print(f"checked {len(cases())} problems on {name}: {bad} wrong, {time.time() - began:.0f} s", flush=True)
    if arguments.quick:
        return bool(bad)

    tasks = [
        (shape, rate, call, config)
        for shape in SHAPES
        for rate, called in ((0.0, ("forward", "dx", "h", "g", "da", "db")), (0.1, ("dx", "h", "da")))
        for call in called
        for config in {"forward": configs.GEMM, "dx": configs.GEMM, "h": configs.DOWN, "g": configs.DOWN}.get(
            call, configs.OUTER
        )
    ]
    failures = [failure for failure in pool.map(compile_one, tasks) if failure]
    pool.shutdown()
    for failure in sorted(set(failures)):
        print("cannot run", failure, flush=True)
    print(f"compiled, {time.time() - began:.0f} s", flush=True)

    table = []
    for shape in SHAPES:
        if time.time() - began > arguments.seconds:
            print(f"out of time before {shape}", flush=True)
            break
        try:
            best = tune(shape, 0.0)
            best_drop = best | {name: config for name, config in tune(shape, 0.1).items() if name in ("dx", "h", "da")}
            say(section="best", shape=shape, best=str(best), dropout=str(best_drop))
            times = whole(shape, best, best_drop)
            say(section="layer", shape=shape, us=times)
            table.append((shape, times))
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()

    print(f"\n{name}: us of the frozen linear, then ratios to it; {time.time() - began:.0f} s")
    columns = ["peft", "addmm", "ours", "peft dropout", "ours dropout", "frozen again"]
    for kind in ("f", "f+b"):
        print(f"{kind:>4} {'M,K,N,r':>24} {'frozen':>8} " + " ".join(f"{column:>13}" for column in columns))
        for shape, times in table:
            base = times.get(f"frozen {kind}", float("nan"))
            ratios = " ".join(f"{times.get(f'{column} {kind}', float('nan')) / base:13.3f}" for column in columns)
            print(f"{'':4} {','.join(map(str, shape)):>24} {base:8.1f} {ratios}")
    for shape, times in table:
        graph = {key: round(value, 1) for key, value in times.items() if key.endswith("graph")}
        if graph:
            print(f"CUDA graph {shape}: {graph}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
