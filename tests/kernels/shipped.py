"""Every different kernel that the table of tiles asks for at the sizes of the benchmark, to lower or to compile.

Different in tiles, in masking or in the layout of the weight; how often a sum is split only counts as split or whole.
Those of groups that share `x` (query, key and value; gate and up) beside those of single products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.kernels import mosaic, mosaic_adapted, mosaic_group, mosaic_many, tuned
from lora_jax.kernels.gemm_config import in_ring, padded_rank
from lora_jax.kernels.mosaic_down import down
from lora_jax.kernels.mosaic_gemm import gemm
from lora_jax.kernels.mosaic_outer import outer

SHAPES = [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (2048, 2048, 8192), (16384, 8192, 8192)]
MANY = [(8192, 4096, 4096, 32), (4096, 2048, 8192, 32)]  # the last: runs of rows
GROUPS = [(8192, 4096, (4096, 1024, 1024)), (8192, 4096, (14336, 14336))]
RANKS = (16, 64, 128, 192, 256)  # as padded
SMS, THRESHOLD = 132, 3277
Shape = tuple[tuple[int, ...], Any]


@dataclass(frozen=True)
class Kernel:
    """A kernel at one size: `run(*operands)` with operands of these shapes and dtypes."""

    name: str
    run: Callable[..., Any]
    operands: tuple[Shape, ...]


def kernels(rank: int, dtype: Any = jnp.bfloat16) -> Iterator[Kernel]:
    """Of several sizes that need the same kernel the first."""
    seen = set()
    for m, k, n in SHAPES:
        for contracted, out in ((k, n), (n, k)):
            for kernel, key in _kernels(m, contracted, out, rank, dtype):
                if key not in seen:
                    seen.add(key)
                    yield kernel
    yield from _grouped(rank, dtype)
    yield from _many(rank, dtype)


def _grouped(rank: int, dtype: Any) -> Iterator[Kernel]:
    """What of `mosaic_group` is no kernel of a single product's: several operands side by side, parts of a thin one."""
    for m, k, ns in GROUPS:
        ranks = (rank,) * len(ns)
        if mosaic_group.unsupported(m, k, ns, ranks, dtype):
            continue
        rank_first, thins = mosaic_group.h_layout(ranks)
        total, together, part, n = sum(thins), padded_rank(sum(ranks)), (thins[0], thins[1]), ns[1]
        x, dys = ((m, k), dtype), tuple(((m, n), dtype) for n in ns)
        h, g = ((total, m) if rank_first else (m, total), dtype), ((m, together), dtype)
        words = f"R={rank} of {len(ns)}"

        run: Any = functools.partial(down, config=tuned.down_config(m, k, total, SMS), by_rank=rank_first)
        yield Kernel(f"down {words}", run, (x, ((total, k), dtype)))
        run = _side_by_side(len(ns), down, config=tuned.down_config(m, sum(ns), together, SMS))
        yield Kernel(f"down {words} side by side", run, (*dys, *(((together, n), dtype) for n in ns)))
        run = functools.partial(gemm, config=tuned.gemm_config(m, k, n, part[1]), part=part)
        yield Kernel(f"gemm {words}", run, (x, ((k, n), dtype), h, ((part[1], n), dtype)))
        run = _of_one(outer, config=_split(tuned.outer_config(m, n, part[1], SMS)), part=part)
        yield Kernel(f"outer {words}", run, (dys[1], h))
        for masked in (False, True):
            config = tuned.gemm_config(m, sum(ns), k, together, dropped=masked, transposed=True)
            run = _side_by_side(len(ns), gemm, config=config, transposed=True, threshold=THRESHOLD)
            operands = (*dys, *(((k, n), dtype) for n in ns), g, ((k, together), dtype))
            name = f"gemm {words} side by side" + (" masked" if masked else "")
            yield Kernel(name, run, (*operands, *([((4,), jnp.int32)] if masked else [])))


def _many(rank: int, dtype: Any) -> Iterator[Kernel]:
    """Of `mosaic_many`, what is no kernel of a single adapter's: factors of each run."""
    for m, k, n, runs in MANY if rank == mosaic_adapted.RANK else MANY[:1]:
        x, dy, w, words = ((m, k), dtype), ((m, n), dtype), ((k, n), dtype), f"R={rank} of runs of {m // runs}"
        if mosaic_many.unsupported(m, k, n, rank, runs, dtype):
            continue
        thin = ((m, rank) if in_ring(rank) else (rank, m), dtype)
        run: Any = functools.partial(down, config=tuned.down_config(m, k, rank, SMS))
        yield Kernel(f"down {words}", run, (x, ((runs, rank, k), dtype)))
        for transposed in (False, True):
            config = mosaic_many.gemm_config(m, k, n, rank, runs)
            run = functools.partial(gemm, config=config, transposed=transposed)
            kernel = ((n, k), dtype) if transposed else w
            tail = ((runs, n, rank) if transposed and in_ring(rank) else (runs, rank, n), dtype)
            yield Kernel(f"gemm {words}" + (" transposed" if transposed else ""), run, (x, kernel, thin, tail))
            if rank == mosaic_adapted.RANK and mosaic.STORES_TRANSPOSED:
                run, factors = functools.partial(mosaic_adapted.adapted, transposed=transposed), (runs, rank)
                operands = (x, kernel, ((*factors, k), dtype), ((*factors, n), dtype))
                yield Kernel(f"adapted {words}" + (" transposed" if transposed else ""), run, operands)
        run = _of_two(outer, config=mosaic_many.outer_config(rank, runs), apart=True)
        yield Kernel(f"outer {words}", run, (x, thin, dy, thin))


def _of_two(kernel: Any, **options: Any) -> Any:
    return lambda x, g, dy, h: kernel([(x, g), (dy, h)], **options)


def _of_one(kernel: Any, **options: Any) -> Any:
    return lambda x, thin: kernel([(x, thin)], **options)


def _side_by_side(count: int, kernel: Any, **options: Any) -> Any:
    """A function of `count` left operands, as many right ones, and the rest; a fifth one is the seed."""

    def run(*operands: Any) -> Any:
        left, right, rest = operands[:count], operands[count : 2 * count], operands[2 * count :]
        seed = {"seed": rest[2]} if len(rest) > 2 else {}
        return kernel(left, right, *rest[:2], **options, **seed)

    return run


def _kernels(m: int, k: int, n: int, rank: int, dtype: Any) -> Iterator[tuple[Kernel, Any]]:
    ring = in_ring(rank)
    x, thin, seed = ((m, k), dtype), ((m, rank) if ring else (rank, m), dtype), ((4,), jnp.int32)
    for masked in (False, True):
        drops: tuple[Shape, ...] = (seed,) if masked else ()

        def options(given: tuple[Any, ...]) -> dict[str, Any]:
            return {"seed": given[0], "threshold": THRESHOLD} if given else {}

        for transposed in (False, True):
            config = tuned.gemm_config(m, k, n, rank, dropped=masked, transposed=transposed)

            def product(x, w, thin, tail, *seed, config=config, transposed=transposed):
                return gemm(x, w, thin, tail, config, transposed=transposed, **options(seed))

            def with_bias(x, w, thin, tail, bias, config=config, transposed=transposed):
                return gemm(x, w, thin, tail, config, transposed=transposed, bias=bias)

            w = ((n, k) if transposed else (k, n), dtype)
            tail = ((n, rank) if transposed and ring else (rank, n), dtype)
            yield _named("gemm", product, config, rank, masked, (x, w, thin, tail, *drops), transposed)
            if not masked:  # the gradient of the input has no bias
                bias = ((n,), jnp.float32)
                yield _named("gemm bias", with_bias, config, rank, masked, (x, w, thin, tail, bias), transposed)
            if rank == mosaic_adapted.RANK and mosaic.STORES_TRANSPOSED:
                yield from _in_one((x, w, ((rank, k), dtype), ((rank, n), dtype)), drops, transposed)
        down_config = _split(tuned.down_config(m, k, rank, SMS, dropped=masked))
        outer_config = _split(tuned.outer_config(m, k + n, rank, SMS, dropped=masked))

        def thin_product(x, a, *seed, config=down_config):
            return down(x, a, config, **options(seed))

        def outer_product(x, g, dy, h, *seed, config=outer_config):
            return outer([(x, g), (dy, h)], config, **options(seed))

        yield _named("down", thin_product, down_config, rank, masked, (x, ((rank, k), dtype), *drops))
        yield _named("outer", outer_product, outer_config, rank, masked, (x, thin, ((m, n), dtype), thin, *drops))


def _in_one(operands: tuple[Shape, ...], drops: tuple[Shape, ...], transposed: bool) -> Iterator[tuple[Kernel, Any]]:
    n, rank, masked = operands[3][0][1], mosaic_adapted.RANK, bool(drops)

    def product(x, w, a, b, *seed):
        options = {"seed": seed[0], "threshold": THRESHOLD} if seed else {}
        return mosaic_adapted.adapted(x, w, a, b, transposed=transposed, **options)

    def with_bias(x, w, a, b, bias):
        return mosaic_adapted.adapted(x, w, a, b, transposed=transposed, bias=bias)

    yield _named("adapted", product, None, rank, masked, (*operands, *drops), transposed)
    if not masked:
        yield _named("adapted bias", with_bias, None, rank, masked, (*operands, ((n,), jnp.float32)), transposed)


def _split(config: Any) -> Any:
    return replace(config, splits=min(config.splits, 2))


def _named(
    kind: str, run: Any, config: Any, rank: int, masked: bool, operands: tuple[Shape, ...], transposed: bool = False
) -> tuple[Kernel, Any]:
    words = [kind, f"R={rank}", *(["transposed"] if transposed else []), *(["masked"] if masked else []), str(config)]
    return Kernel(" ".join(words), run, operands), tuple(words)


def abstract(kernel: Kernel, **options: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype, **options) for shape, dtype in kernel.operands]
