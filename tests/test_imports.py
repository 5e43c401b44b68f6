"""What `import lora_jax` loads, and what it costs. (The direction of imports is import-linter's: `./run lint`.)"""

import statistics
import subprocess
import sys

import pytest

# Each would be slow to load, or is not installed with the core.
HEAVY = ["torch", "triton", "jax_triton", "orbax", "matplotlib", "transformers", "lora_torch", "lora_examples"]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str) -> list[str]:
    return python(f"import sys\n{statement}\nprint(*[m for m in {HEAVY} if m in sys.modules])").split()


def test_import_is_light() -> None:
    # What jax and flax load themselves is theirs: some releases of flax load orbax.
    ours = set(loaded_by("import lora_jax")) - set(loaded_by("import jax, flax"))
    assert not ours


def test_heavy_modules_would_be_noticed() -> None:
    assert loaded_by("import lora_jax, orbax.checkpoint") == ["orbax"]


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_front_ends_load_when_used(front_end: str) -> None:
    code = f"""
import sys
import lora_jax
assert "lora_jax.{front_end}" not in sys.modules
lora_jax.{front_end}.adapt
assert "lora_jax.{front_end}" in sys.modules
"""
    python(code)


@pytest.mark.parametrize("front_end", ["lora_jax.linen", "lora_jax.nnx"])
def test_front_ends_need_no_torch(front_end: str) -> None:
    assert not {"torch", "triton", "transformers"} & set(loaded_by(f"import {front_end}"))


def test_lora_torch_imports_without_torch() -> None:
    python("import sys; sys.modules['torch'] = None; import lora_torch")


def test_torch_modules_need_no_jax() -> None:
    pytest.importorskip("torch")
    python(
        "import sys; import lora_torch.torchtune; assert 'jax' not in sys.modules; assert 'torchao' not in sys.modules"
    )


def seconds_to_import(modules: str) -> float:
    """Processor time, which a busy machine disturbs less than the clock on the wall."""
    return float(python(f"import time; t = time.process_time(); import {modules}; print(time.process_time() - t)"))


def test_import_time() -> None:
    def ratio(rounds: int) -> float:
        pairs = [(seconds_to_import("lora_jax"), seconds_to_import("jax, flax")) for _ in range(rounds)]
        ours, theirs = zip(*pairs, strict=True)
        return statistics.median(ours) / statistics.median(theirs)

    measured = ratio(3)
    if measured >= 1.5:  # a bad moment, or the truth: look closer before saying so
        measured = ratio(15)
    assert measured < 1.5
