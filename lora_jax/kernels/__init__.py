"""Fused kernels, one per file. They know arrays, not models; `mosaic_*` is Pallas, `triton_*` plain Triton."""
