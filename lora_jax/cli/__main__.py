"""`python -m lora_jax.cli` is `lora-jax`, for places where scripts are not on the path."""

import sys

from lora_jax.cli import main

sys.exit(main())
