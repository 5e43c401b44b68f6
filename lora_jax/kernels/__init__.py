"""GPU kernels, one a file, with no knowledge of models, adapters or plans.

`mosaic_*` are Pallas for Hopper, `triton_*` plain Triton without jax or torch; `counter_bits` makes everyone's masks.
"""
