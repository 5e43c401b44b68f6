"""Which tiles for which shape: as measured by the user, else as measured by us, else the general ones.

Plain numbers: nothing of Pallas. `tuning_cache.py` is the first source, `tuned_rows.py` the second. Of either, only
tiles are taken that are among the candidates of the very sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lora_jax import _compat
from lora_jax.kernels import tuning_cache
from lora_jax.kernels.gemm_config import SHARED_BYTES, GemmConfig, in_ring, padded_rank, unsupported
from lora_jax.kernels.measured import Race
from lora_jax.kernels.mosaic_down import DownConfig
from lora_jax.kernels.mosaic_outer import OuterConfig
from lora_jax.kernels.shape_class import ShapeClass, class_of, distance
from lora_jax.kernels.tuned_rows import RACES, TILES

# Changes to the general tiles that `tune` tries.
_GEMM: tuple[dict[str, Any], ...] = (
    {},
    {"width": 4},
    {"width": 16},
    {"minor": "n"},
    {"minor": "n", "width": 4},
    {"cluster": "m"},
    {"cluster": ""},
    {"split": "n"},
    {"split": "n", "cluster": "m"},
    {"split": "", "cluster": "m"},
    {"stages": 3},
    {"delay": 0},
)
_DOWN = (
    (6, 128, 2),
    (6, 128, 3),
    (4, 128, 2),
    (8, 64, 2),
    (6, 64, 3),
    (4, 64, 2),
    (2, 64, 1),
)  # stages, depth, workers
_OUTER = ((8, 2), (6, 2), (6, 3), (4, 2), (2, 1))  # stages, workers


def gemm_config(m: int, k: int, n: int, rank: int, *, dropped: bool = False, transposed: bool = False) -> GemmConfig:
    shape = class_of(m, k, n, rank, dropped=dropped, transposed=transposed)
    return measured("mosaic_gemm", shape, gemm_candidates(m, k, n, rank, dropped=dropped))


def down_config(m: int, k: int, rank: int, sms: int, *, dropped: bool = False) -> DownConfig:
    return measured("mosaic_down", class_of(m, k, 0, rank, dropped=dropped), down_candidates(m, k, rank, sms))


def outer_config(m: int, k: int, rank: int, sms: int, *, dropped: bool = False) -> OuterConfig:
    return measured("mosaic_outer", class_of(m, k, 0, rank, dropped=dropped), outer_candidates(m, k, rank, sms))


def gemm_candidates(m: int, k: int, n: int, rank: int, *, dropped: bool = False) -> list[GemmConfig]:
    """The general tiles first, whether the kernel takes these sizes or not; then others that it takes."""
    general, padded = GemmConfig(), padded_rank(rank)
    # A masked tail is cut where the weight's swizzle allows it, every 64 columns, and keeps its slots until the tile is
    # stored: four of the ring's for a rank of 256.
    if dropped and in_ring(padded):
        general = GemmConfig(tile_m=64, stages=6, store_n=64) if rank > 128 else GemmConfig(store_n=64)
    m, k, n = -(-m // 8) * 8, -(-k // 64) * 64, -(-n // 64) * 64
    others = [replace(general, **changes) for changes in _GEMM[1:]]
    return [general, *(each for each in others if unsupported(m, k, n, padded, each, masked=dropped) is None)]


def down_candidates(m: int, k: int, rank: int, sms: int) -> list[DownConfig]:
    """The general tiles first."""
    found = []
    for stages, depth, workers in _DOWN:
        # Few rows leave most of the chip idle: K is cut too, down to four steps each.
        splits = max(1, min(sms // -(-m // 64), -(-k // depth) // 4))
        found.append(DownConfig(stages=stages, depth=depth, workers=workers, splits=splits))
    return _fitting(found, rank)


def outer_candidates(m: int, k: int, rank: int, sms: int) -> list[OuterConfig]:
    """The general tiles first."""
    found = []
    # The accumulator of a worker is columns x rank: 128 registers a thread at most.
    for columns in (128, 64) if padded_rank(rank) <= 128 else (64,):
        blocks, steps = -(-k // columns), -(-m // 64)
        # Rounds of CTAs, each as long as its steps and about six more to begin and to end.
        splits = min(range(1, max(2, steps // 8 + 1)), key=lambda s: -(-blocks * s // sms) * (-(-steps // s) + 6))
        found += [OuterConfig(columns=columns, stages=s, workers=w, splits=splits) for s, w in _OUTER]
    return _fitting(found, rank)


def slower(family: str, m: int, k: int, n: int, rank: int, dropped: bool, device: str) -> str | None:
    """Why XLA is the faster for such a shape, by the nearest one that was measured, or None.

    Raises `LookupError` where nothing was measured on such a device.
    """
    race = _nearest(family, m, k, n, rank, dropped, device)
    return None if race.kernels < race.xla else _told(race)


def faster(family: str, m: int, k: int, n: int, rank: int, dropped: bool, device: str) -> str:
    """The measurement that speaks for a shape for which nothing is `slower`."""
    return _told(_nearest(family, m, k, n, rank, dropped, device))


def _nearest(family: str, m: int, k: int, n: int, rank: int, dropped: bool, device: str) -> Race:
    """Of equally near ones that of the very device.

    The Hopper kernels are for one kind of chip, so that sizes count for more; of those for several kinds the device's
    own measurements count alone.
    """
    races = [race for race in RACES[family] if family == "mosaic_gpu" or race.device == device]
    if not races:
        raise LookupError(device)

    def doublings(race: Race) -> tuple[bool, float, bool]:
        away = distance(_whole(race.m, race.k, race.n, race.r), _whole(m, k, n, rank))
        return race.dropped != dropped, away, race.device != device

    return min(races, key=doublings)


def _told(race: Race) -> str:
    return (
        f"XLA took {race.xla:.2f} and the kernels {race.kernels:.2f} times the frozen linear for the nearest sizes "
        f"that were measured, M={race.m}, K={race.k}, N={race.n}, R={race.r} on {race.device}"
    )


def _whole(m: int, k: int, n: int, rank: int) -> ShapeClass:
    return ShapeClass(m, k, n, padded_rank(rank))


def _fitting(found: list[Any], rank: int) -> list[Any]:
    fitting = [each for each in found if each.shared_bytes(padded_rank(rank)) <= SHARED_BYTES]
    assert fitting, rank
    return fitting


def measured(kernel: str, shape: ShapeClass, candidates: Sequence[Any]) -> Any:
    """Of the candidates the one measured as the fastest, by the user or by us, else the first. For any family."""
    device = _compat.target_device().kind
    entry = tuning_cache.find(device, kernel, shape)
    wanted = [entry["config"]] if entry else []
    wanted += [row.config for row in TILES if (row.device, row.kernel, row.shape) == (device, kernel, asdict(shape))]
    for config in wanted:
        for candidate in candidates:
            if tiles_of(candidate) == config:
                return candidate
    return candidates[0]


def tiles_of(config: Any) -> Mapping[str, Any]:
    """What is kept of a configuration: how often a sum is cut follows from the sizes themselves."""
    return {name: value for name, value in asdict(config).items() if name != "splits"}
