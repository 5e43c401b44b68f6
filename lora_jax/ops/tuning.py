"""`tune`: which tiles and which implementation are the fastest for given sizes on the GPU here, kept for this user.

Two kinds of measurement go into the file of `lora_jax/kernels/tuning_cache.py`: of each kernel of a family that says
what there is to tune (`stages` in `families.py`), the fastest of the candidates that give the right result; and of the
whole product, forward and backward, whether XLA or a family is the fastest with these tiles.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax.kernels import tuning_cache
from lora_jax.kernels.shape_class import class_of
from lora_jax.kernels.stage import Stage, added_up, excess, product, roundoff, summed
from lora_jax.kernels.tuned import tiles_of
from lora_jax.kernels.tuning_cache import Entries
from lora_jax.ops.choice import device_lacks
from lora_jax.ops.dropout import keeps, seed_words, threshold
from lora_jax.ops.families import FAMILIES, kernels
from lora_jax.ops.lora_dot import lora_dot
from lora_jax.ops.timing import chained, interleaved

Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]
Sizes = tuple[int, int, int, int]
# General tiles stay unless others are faster by more than measurements differ.
MARGIN = 0.01
COMPILERS = min(14, os.cpu_count() or 1)


def tune(
    shapes: Iterable[Sizes],
    *,
    dropout_rate: float = 0.0,
    dtype: Any = jnp.bfloat16,
    calls: int = 8,
    timer: Timer = interleaved,
    report: Callable[[str], None] = print,
) -> Entries:
    """Measures products `(M, K) x (K, N)` with a rank R on this process's GPU, and stores what won.

    **Arguments:**

    - `shapes`: `(M, K, N, R)` each; of a model, `lora_jax.explain(fn, plan)(...).shapes`.
    - `dropout_rate`: as in training; with and without are different measurements.
    - `dtype`: bfloat16 or float16.
    - `calls`: of a kernel in one program, each on data of its own, so that launches and caches count for little.
    - `timer`: from functions that start some work to the seconds that each takes.
    - `report`: gets a line for each kernel and each product.

    **Returns:** what was stored. Processes that start later use it; this one goes on as before, until
    `lora_jax.kernels.tuning_cache.reread()`, and what it has compiled by then stays as it is. JAX's caches are cleared.

    **Raises:** `ValueError` where no family of kernels can run, with the reasons; `RuntimeError` where kernels give a
    wrong result with the tiles that ship. Before anything is measured, `ValueError` for a damaged file of measurements
    and `OSError` for one that can't be written.
    """
    families, reasons = [], []
    for name, family in FAMILIES.items():
        why = device_lacks(family) or (module if isinstance(module := family.load(), str) else None)
        reasons.append(f"{name}: {why}")
        families += [name] if why is None else []
    if not families:
        raise ValueError("nothing can be tuned here, for want of a supported GPU. " + "; ".join(reasons))
    below = threshold(dropout_rate) if dropout_rate else 0
    tuning_cache.check()
    tuning_cache.known()
    stored: Entries = {}
    for sizes in dict.fromkeys(shapes):
        modules = {name: kernels(name) for name in families}
        lacking = {name: why for name, each in modules.items() if (why := each.unsupported(*sizes, dtype))}
        if len(lacking) == len(modules):
            raise ValueError(f"no kernels for M, K, N, R = {sizes}: {lacking}")
        able = {name: each for name, each in modules.items() if name not in lacking}
        entries: Entries = {}
        for name, module in able.items():
            for stage in module.stages(*sizes, dtype, below) if hasattr(module, "stages") else ():
                # Without dropout, the passes over `x` and over `dy` may be of one class.
                if (_compat.target_device().kind, stage.kernel, stage.shape) not in entries:
                    entries |= _fastest_tiles(name, stage, calls, timer, report)
        with tuning_cache.trying(entries):
            entries |= _winner(sizes, list(able), dropout_rate, dtype, calls, timer, report)
        tuning_cache.store(entries)
        stored |= entries
    return stored


def _fastest_tiles(family: str, stage: Stage, calls: int, timer: Timer, report: Callable[[str], None]) -> Entries:
    """Compiles, checks and times the candidates of one kernel."""
    expected = jax.jit(stage.expected)(*stage.operands)
    _check_bound(excess(expected.mistake, expected.value, expected.bound), f"{stage.kernel} at {stage.shape}")
    inputs = [(each,) for each in _copies(stage.operands[0], calls)]

    def compiled(config: Any) -> Callable[[], Any] | str:
        try:
            return chained(lambda *operands: stage.run(config, *operands), inputs, stage.operands[1:])
        except Exception as error:  # noqa: BLE001  (whatever a compiler says of tiles: the others are still of interest)
            return f"{type(error).__name__}: {str(error)[:200]}"

    with ThreadPoolExecutor(COMPILERS) as threads:
        built = list(threads.map(compiled, stage.candidates))
    right: list[tuple[Any, Callable[[], Any]]] = []
    for i, (config, run) in enumerate(zip(stage.candidates, built, strict=True)):
        wrong = run if isinstance(run, str) else None
        if not isinstance(run, str):
            worst = max(excess(got, expected.value, expected.bound) for got in run())
            wrong = f"its error is {worst:.3g} times the bound" if worst > 1 else None
            right += [] if wrong else [(config, run)]
        if wrong and i == 0:
            raise RuntimeError(f"{family}'s {stage.kernel} fails with the tiles that ship, {config}: {wrong}")
        if wrong:
            report(f"left out {stage.kernel} {config}: {wrong}")
    del expected
    seconds = [each / len(inputs) for each in timer([run for _, run in right])]
    best = min(range(len(right)), key=seconds.__getitem__)
    if seconds[best] > (1 - MARGIN) * seconds[0]:
        best = 0
    micro = {"best": 1e6 * seconds[best], "general": 1e6 * seconds[0]}
    report(f"{stage.kernel} {stage.shape}: {micro['general']:.1f} -> {micro['best']:.1f} us, {right[best][0]}")
    content = {"config": dict(tiles_of(right[best][0])), "general": best == 0, "microseconds": micro, **_about()}
    return {(_compat.target_device().kind, stage.kernel, stage.shape): content}


def _winner(
    sizes: Sizes,
    families: list[str],
    rate: float,
    dtype: Any,
    calls: int,
    timer: Timer,
    report: Callable[[str], None],
) -> Entries:
    """Checks and times the whole product, forward and backward, by XLA and by each family."""
    jax.clear_caches()  # tiles are chosen while JAX traces: what was traced before has others
    x, dy, w, a, b = jax.jit(_operands, static_argnums=(0, 1))(sizes, dtype)
    key = jax.random.key(2)

    def both(implementation: str) -> Callable[..., Any]:
        def fn(x: Any, dy: Any, w: Any, a: Any, b: Any, key: Any) -> Any:
            options = {"dropout_rate": rate, "key": key if rate else None, "implementation": implementation}
            y, back = jax.vjp(lambda x, a, b: lora_dot(x, w, a, b, **options), x, a, b)
            return y, *back(dy)

        return fn

    expected = jax.jit(lambda *operands: list(_expected(operands, rate, dtype)))(x, dy, w, a, b, key)
    inputs, names, runs = list(zip(_copies(x, calls), _copies(dy, calls), strict=True)), ["xla", *families], []
    for name in names:
        run = chained(both(name), inputs, (w, a, b, key))
        if name != "xla":
            for what, got, (value, bound, mistake) in zip(("y", "dx", "dA", "dB"), run()[0], expected, strict=True):
                _check_bound(excess(mistake, value, bound), f"{what} of {sizes}")
                worst = excess(got, value, bound)
                if worst > 1:
                    raise RuntimeError(f"{name}: the error of {what} of {sizes} is {worst:.3g} times its bound")
        runs.append(run)
    del expected
    micro = {name: 1e6 * each / len(inputs) for name, each in zip(names, timer(runs), strict=True)}
    winner = min(micro, key=micro.__getitem__)
    report(f"{sizes}, dropout {rate}: {winner}  " + ", ".join(f"{name} {each:.0f} us" for name, each in micro.items()))
    shape = class_of(*sizes, dropped=rate > 0)
    content = {"winner": winner, "microseconds": micro, "sizes": list(sizes), **_about()}
    return {(_compat.target_device().kind, "implementation", shape): content}


def _operands(sizes: Sizes, dtype: Any) -> list[jax.Array]:
    """`x`, `dy`, `w`, and factors in float32, as adapters are, with values that the cast to `dtype` leaves alone."""
    m, k, n, r = sizes
    shapes = [((m, k), 1.0), ((m, n), 1.0), ((k, n), k**-0.5), ((k, r), k**-0.5), ((r, n), r**-0.5)]
    drawn = [
        spread * jax.random.normal(key, shape, jnp.float32)
        for key, (shape, spread) in zip(jax.random.split(jax.random.key(1), 5), shapes, strict=True)
    ]
    # Not by a cast and one back, which XLA leaves out.
    about = jnp.finfo(dtype)
    factors = [lax.reduce_precision(factor, about.nexp, about.nmant) for factor in drawn[3:]]
    return [*(each.astype(dtype) for each in drawn[:3]), *factors]


def _expected(operands: Sequence[Any], rate: float, dtype: Any) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """(value, bound, value without the adapter or at half its size) of y, dx, dA and dB.

    The roundings are those of `lora_jax.reference.fused`.
    """
    x, dy, w, a, b, key = operands
    keep = 1.0
    if rate:
        keep = keeps(seed_words(key), x.shape, (1,), threshold(rate)) * jnp.float32(65536 / (65536 - threshold(rate)))
    dropped, once, (m, k), (r, n) = x * keep, roundoff(dtype), x.shape, b.shape
    h, g = product(dropped, a), product(dy, b.T)
    h_off = once * abs(h) + summed(k) * product(abs(dropped), abs(a))
    g_off = once * abs(g) + summed(n) * product(abs(dy), abs(b.T))
    for wide, weight, thin, off, factor, mask in ((x, w, h, h_off, b, 1.0), (dy, w.T, g, g_off, a.T, keep)):
        base = product(wide, weight)
        value = base + mask * product(thin, factor)
        size = product(abs(wide), abs(weight)) + mask * product(abs(thin), abs(factor))
        bound = once * abs(value) + mask * product(off, abs(factor)) + summed(wide.shape[1] + r) * size
        yield value, bound, base
    for left, thin, off in ((dropped, g, g_off), (dy, h, h_off)):
        value = product(left.T, thin)
        bound = added_up(left, off) + summed(m) * product(abs(left).T, abs(thin))
        yield (value, bound, value / 2) if left is dropped else (value.T, bound.T, value.T / 2)


def _check_bound(mistake: float, what: str) -> None:
    if mistake <= 1:
        raise RuntimeError(f"the bound for {what} would not tell a wrong result from a right one")


def _copies(x: jax.Array, calls: int) -> list[jax.Array]:
    """Inputs to take in turn, so that none lies in the cache of the GPU by chance."""
    return [x, *(jnp.copy(x) for _ in range(calls - 1))]


def _about() -> dict[str, str]:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"kernels": tuning_cache.kernels(), "jax": jax.__version__, "date": date}
