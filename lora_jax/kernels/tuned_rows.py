"""What was measured where. Written by `benchmarks/tuned_rows.py`, each row from the line that it cites."""

# ruff: noqa: E501
from __future__ import annotations

from lora_jax.kernels.measured import Race, Tiles

RACES: dict[str, tuple[Race, ...]] = {
    "mosaic_gpu": (
        Race("NVIDIA H100 80GB HBM3", 8192, 4096, 4096, 16, False, 1.3185, 1.1452, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 8192, 4096, 4096, 16, True, 1.4489, 1.157, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 8192, 4096, 14336, 16, False, 1.1908, 1.0454, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 8192, 4096, 14336, 16, True, 1.252, 1.0925, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 256, 4096, 4096, 16, False, 1.3819, 2.2615, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 256, 4096, 4096, 16, True, 1.5286, 2.3097, "71e7bd2"),
        Race("NVIDIA H200", 8192, 4096, 4096, 16, False, 1.3001, 1.1313, "57dda29"),
        Race("NVIDIA H200", 8192, 4096, 4096, 16, True, 1.353, 1.2405, "57dda29"),
        Race("NVIDIA H200", 8192, 4096, 14336, 16, False, 1.1647, 1.0736, "57dda29"),
        Race("NVIDIA H200", 8192, 4096, 14336, 16, True, 1.1632, 1.0969, "57dda29"),
        Race("NVIDIA H200", 8192, 14336, 4096, 64, False, 1.2039, 1.1181, "57dda29"),
        Race("NVIDIA H200", 8192, 14336, 4096, 64, True, 1.2266, 1.1857, "57dda29"),
        Race("NVIDIA H200", 16384, 8192, 8192, 64, False, 1.1171, 1.0775, "57dda29"),
        Race("NVIDIA H200", 16384, 8192, 8192, 64, True, 1.1556, 1.1111, "57dda29"),
        Race("NVIDIA H200", 2048, 2048, 8192, 16, False, 1.4684, 1.2204, "57dda29"),
        Race("NVIDIA H200", 2048, 2048, 8192, 16, True, 1.4734, 1.3289, "57dda29"),
        Race("NVIDIA H200", 256, 4096, 4096, 16, False, 1.4442, 2.8131, "57dda29"),
        Race("NVIDIA H200", 256, 4096, 4096, 16, True, 1.6222, 3.0372, "57dda29"),
        Race("NVIDIA H100 80GB HBM3", 512, 4096, 4096, 16, False, 1.6635, 2.3617, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 512, 4096, 4096, 16, True, 1.77, 2.4612, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 1024, 4096, 4096, 16, False, 1.5597, 1.3768, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 1024, 4096, 4096, 16, True, 1.5846, 1.3574, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 2048, 4096, 4096, 16, False, 1.3993, 1.2084, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 2048, 4096, 4096, 16, True, 1.5452, 1.259, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 4096, 4096, 4096, 16, False, 1.36, 1.1439, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 4096, 4096, 4096, 16, True, 1.4805, 1.2215, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 512, 4096, 14336, 16, False, 1.3014, 1.8333, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 512, 4096, 14336, 16, True, 1.4012, 1.6558, "c5e0c20"),
        Race("NVIDIA H100 80GB HBM3", 1024, 4096, 14336, 16, False, 1.2959, 1.2494, "a7b9a69"),
        Race("NVIDIA H100 80GB HBM3", 1024, 4096, 14336, 16, True, 1.3428, 1.2665, "a7b9a69"),
        Race("NVIDIA H100 80GB HBM3", 2048, 4096, 14336, 16, False, 1.2537, 1.0978, "a7b9a69"),
        Race("NVIDIA H100 80GB HBM3", 2048, 4096, 14336, 16, True, 1.284, 1.1359, "a7b9a69"),
        Race("NVIDIA H100 80GB HBM3", 8192, 14336, 4096, 64, False, 1.2494, 1.1321, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 8192, 14336, 4096, 64, True, 1.3285, 1.1505, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 16384, 8192, 8192, 64, False, 1.1665, 1.0959, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 16384, 8192, 8192, 64, True, 1.2112, 1.1105, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 2048, 2048, 8192, 16, False, 1.4843, 1.2354, "71e7bd2"),
        Race("NVIDIA H100 80GB HBM3", 2048, 2048, 8192, 16, True, 1.5738, 1.2936, "71e7bd2"),
    ),
    "triton": (
        Race("NVIDIA H100 80GB HBM3", 8192, 4096, 4096, 16, False, 1.3515, 1.9866, "ccf3bcf"),
        Race("NVIDIA H100 80GB HBM3", 8192, 4096, 4096, 16, True, 1.481, 1.9386, "ccf3bcf"),
        Race("NVIDIA H100 80GB HBM3", 8192, 4096, 14336, 16, False, 1.2423, 1.8317, "ccf3bcf"),
        Race("NVIDIA H100 80GB HBM3", 8192, 4096, 14336, 16, True, 1.2789, 1.822, "ccf3bcf"),
        Race("NVIDIA H100 80GB HBM3", 2048, 2048, 8192, 16, False, 1.5136, 2.0699, "ccf3bcf"),
        Race("NVIDIA H100 80GB HBM3", 2048, 2048, 8192, 16, True, 1.651, 2.096, "ccf3bcf"),
        Race("NVIDIA H100 80GB HBM3", 1024, 4096, 4096, 16, False, 1.5911, 2.1831, "ccf3bcf"),
        Race("NVIDIA H100 80GB HBM3", 1024, 4096, 4096, 16, True, 1.6437, 2.2675, "ccf3bcf"),
    ),
}  # fmt: skip
TILES: tuple[Tiles, ...] = (
    Tiles("NVIDIA H100 80GB HBM3", "mosaic_gemm", {"m": 8192, "k": 16384, "n": 4096, "rank": 64, "dropped": False, "transposed": False}, {"tile_m": 128, "tile_n": 128, "stages": 4, "split": "m", "cluster": "n", "minor": "m", "width": 4, "store_n": 32, "delay": 1}, "ccf3bcf"),
    Tiles("NVIDIA H100 80GB HBM3", "mosaic_gemm", {"m": 16384, "k": 8192, "n": 8192, "rank": 64, "dropped": False, "transposed": False}, {"tile_m": 128, "tile_n": 128, "stages": 4, "split": "m", "cluster": "n", "minor": "m", "width": 8, "store_n": 32, "delay": 0}, "ccf3bcf"),
    Tiles("NVIDIA H100 80GB HBM3", "mosaic_gemm", {"m": 16384, "k": 8192, "n": 8192, "rank": 64, "dropped": False, "transposed": True}, {"tile_m": 128, "tile_n": 128, "stages": 4, "split": "m", "cluster": "n", "minor": "m", "width": 8, "store_n": 32, "delay": 0}, "ccf3bcf"),
)  # fmt: skip
