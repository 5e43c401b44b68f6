"""GPU kernels: one a file, no knowledge of models, adapters or plans."""
