"""GPU kernels, one a file, with no knowledge of models, adapters or plans.

`mosaic_*` are Pallas for Hopper. `triton_*` are plain Triton without jax or torch, but for `triton_lora`, which
launches them from JAX. `counter_bits` makes everyone's masks.
"""
