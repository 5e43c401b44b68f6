"""The family of Triton kernels on a CPU: `triton_lora` as it is, on a stand-in for jax-triton that interprets."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax

from lora_jax.ops.families import FAMILIES, Family

MODULE, FOLDER = "lora_jax.kernels.triton_lora", str(Path(__file__).with_name("stand_in"))


@contextlib.contextmanager
def installed() -> Iterator[ModuleType]:
    """`implementation="triton"` runs on the CPU; yields the module."""
    before = FAMILIES["triton"]
    FAMILIES["triton"] = Family(MODULE, ("cpu",), "a CPU")
    _forget()
    sys.path.insert(0, FOLDER)
    jax.clear_caches()
    try:
        yield importlib.import_module(MODULE)
    finally:
        sys.path.remove(FOLDER)
        FAMILIES["triton"] = before
        _forget()


def _forget() -> None:
    for name in (MODULE, "jax_triton"):
        sys.modules.pop(name, None)
