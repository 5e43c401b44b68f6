"""Which of these tests can run on this jax."""

from importlib.metadata import version

# The GPU interpreter of jax 0.10 has no transposed operands and never ends on a machine of two cores. The version is
# read without importing jax, whose platform is not chosen yet when this file is loaded.
_INTERPRETED = tuple(map(int, version("jax").split(".")[:2])) >= (0, 11)
collect_ignore = [] if _INTERPRETED else ["test_mosaic_interpret.py"]
