"""The kernels of a linear layer on Hopper, one by one, to be tuned: `lora-jax tune`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.kernels import tuned
from lora_jax.kernels.gemm_config import in_ring, padded_rank
from lora_jax.kernels.mosaic_down import down
from lora_jax.kernels.mosaic_gemm import gemm
from lora_jax.kernels.mosaic_outer import outer
from lora_jax.kernels.shape_class import class_of
from lora_jax.kernels.stage import Expected, Stage, kept, product, roundoff, summed


def stages(
    m: int, k: int, n: int, r: int, dtype: Any, threshold: int, *, sms: int = 132, interpret: Any = None
) -> Iterator[Stage]:
    """The kernels of `mosaic_lora.forward` and `backward`, a weight stored (K, N); `threshold`: 0 for no dropout."""
    (m, k, n), rank = (-(-m // 8) * 8, -(-k // 64) * 64, -(-n // 64) * 64), padded_rank(r)
    ring, seed = in_ring(rank), jnp.array([1, 2, 0, 0], jnp.int32)
    keys = iter(jax.random.split(jax.random.key(0), 7))

    def normal(*shape: int, spread: float = 1.0) -> jax.Array:
        return (spread * jax.random.normal(next(keys), shape, jnp.float32)).astype(dtype)

    def laid(rows: jax.Array) -> jax.Array:
        """As thin operands lie, with the zeros of `down`."""
        rows = jnp.pad(rows, ((0, -m % 64), (0, 0)))
        return rows if ring else rows.T

    def options(below: int) -> dict[str, Any]:
        return {"interpret": interpret, **({"seed": seed, "threshold": below} if below else {})}

    x, dy, w = normal(m, k), normal(m, n), normal(k, n, spread=k**-0.5)
    a_t, b = normal(rank, k, spread=k**-0.5), normal(rank, n)
    h, g = laid(normal(m, rank)), laid(normal(m, rank))

    def product_stage(x: Any, w: Any, thin: Any, factor: Any, below: int, transposed: bool) -> Stage:
        """`x·w` with the tail `thin·factor`, or with `wᵀ`."""
        tail = factor.T if transposed and ring else factor
        inner, out = (n, k) if transposed else (k, n)

        def run(config: Any, x: Any, w: Any, thin: Any, tail: Any) -> Any:
            return gemm(x, w, thin, tail, config, transposed=transposed, sms=sms, **options(below))

        def expected(x: Any, w: Any, thin: Any, tail: Any) -> Expected:
            factor = tail.T if transposed and ring else tail
            w, thin, keep = w.T if transposed else w, _rows(thin, ring)[:m], kept((m, out), seed, below)
            base, low = product(x, w), keep * product(thin, factor)
            size = product(abs(x), abs(w)) + keep * product(abs(thin), abs(factor))
            return Expected(base + low, roundoff(dtype) * abs(base + low) + summed(inner + rank) * size, base + low / 2)

        candidates = tuned.gemm_candidates(m, inner, out, r, dropped=below > 0)
        shape = class_of(m, inner, out, r, dropped=below > 0, transposed=transposed)
        return Stage("mosaic_gemm", shape, candidates, run, expected, (x, w, thin, tail))

    def down_stage(x: Any, factor: Any, below: int) -> Stage:
        width = x.shape[1]

        def run(config: Any, x: Any, factor: Any) -> Any:
            return down(x, factor, config, **options(below))

        def expected(x: Any, factor: Any) -> Expected:
            x, factor = x * kept((m, width), seed, below), factor.T
            value = product(x, factor)
            bound = roundoff(dtype) * abs(value) + summed(width) * product(abs(x), abs(factor))
            return Expected(*map(laid, (value, bound, value - product(x[:, :64], factor[:64]))))

        shape, found = class_of(m, width, 0, r, dropped=below > 0), tuned.down_candidates(m, width, r, sms)
        return Stage("mosaic_down", shape, found, run, expected, (x, factor))

    def outer_stage() -> Stage:
        def run(config: Any, x: Any, g: Any, dy: Any, h: Any) -> Any:
            return jnp.concatenate(outer([(x, g), (dy, h)], config, **options(threshold)))

        def expected(x: Any, g: Any, dy: Any, h: Any) -> Expected:
            pairs = [(x * kept((m, k), seed, threshold), _rows(g, ring)[:m]), (dy, _rows(h, ring)[:m])]
            value = jnp.concatenate([product(x.T, thin) for x, thin in pairs])
            bound = summed(m) * jnp.concatenate([product(abs(x).T, abs(thin)) for x, thin in pairs])
            return Expected(value, bound, value - jnp.concatenate([product(x[:64].T, t[:64]) for x, t in pairs]))

        shape, found = class_of(m, k + n, 0, r, dropped=threshold > 0), tuned.outer_candidates(m, k + n, r, sms)
        return Stage("mosaic_outer", shape, found, run, expected, (x, g, dy, h))

    yield product_stage(x, w, h, b, 0, transposed=False)
    yield product_stage(dy, w, g, a_t, threshold, transposed=True)
    yield down_stage(x, a_t, threshold)
    yield down_stage(dy, b, 0)
    yield outer_stage()


def _rows(thin: jax.Array, ring: bool) -> jax.Array:
    return thin if ring else thin.T
