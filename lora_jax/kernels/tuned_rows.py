"""What was measured where. Written by `benchmarks/tuned_rows.py`, each row from the line that it cites."""

from __future__ import annotations

from lora_jax.kernels.measured import Race, Tiles

RACES: tuple[Race, ...] = (
    Race("NVIDIA H100 80GB HBM3", 8192, 4096, 4096, 16, False, 1.4004, 1.1589, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 8192, 4096, 4096, 16, True, 1.4788, 1.2312, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 8192, 4096, 14336, 16, False, 1.2532, 1.1223, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 8192, 4096, 14336, 16, True, 1.2631, 1.1324, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 256, 4096, 4096, 16, False, 1.5238, 2.4682, "1188340"),
    Race("NVIDIA H100 80GB HBM3", 256, 4096, 4096, 16, True, 1.606, 2.6902, "1188340"),
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
    Race("NVIDIA H100 80GB HBM3", 512, 4096, 4096, 16, False, 1.6312, 2.3619, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 512, 4096, 4096, 16, True, 1.74, 2.6019, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 1024, 4096, 4096, 16, False, 1.5088, 1.3317, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 1024, 4096, 4096, 16, True, 1.5412, 1.4616, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 2048, 4096, 4096, 16, False, 1.4063, 1.2392, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 2048, 4096, 4096, 16, True, 1.5033, 1.3955, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 4096, 4096, 4096, 16, False, 1.4011, 1.159, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 4096, 4096, 4096, 16, True, 1.4663, 1.3047, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 512, 4096, 14336, 16, False, 1.2911, 1.8286, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 512, 4096, 14336, 16, True, 1.3426, 1.6443, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 1024, 4096, 14336, 16, False, 1.2959, 1.2494, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 1024, 4096, 14336, 16, True, 1.3428, 1.2665, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 2048, 4096, 14336, 16, False, 1.2537, 1.0978, "a7b9a69"),
    Race("NVIDIA H100 80GB HBM3", 2048, 4096, 14336, 16, True, 1.284, 1.1359, "a7b9a69"),
)  # fmt: skip
TILES: tuple[Tiles, ...] = ()
