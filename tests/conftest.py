"""What every test shares: the backend, the PRNG keys, JAX's strict modes."""

import os
import zlib
from collections.abc import Iterator

import pytest

KEYS_USED = pytest.StashKey["Keys"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="the seed of every `keys` fixture, to repeat a failure")


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports jax. `-m gpu` leaves the choice to JAX; every other run is on the CPU, also on a
    # machine that has a GPU, so that it gives the same numbers everywhere.
    if config.option.markexpr != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Likewise before anything imports triton: its kernels are then interpreted.
        os.environ["TRITON_INTERPRET"] = "1"
    # transformers and peft look models up on their hub when they may. No test needs one.
    os.environ["HF_HUB_OFFLINE"] = "1"


class Keys:
    """An endless supply of different PRNG keys; call it for the next one."""

    def __init__(self, seed: int):
        self.seed = seed
        self._count = 0

    def __call__(self):
        import jax

        self._count += 1
        return jax.random.fold_in(jax.random.key(self.seed), self._count)

    def __repr__(self) -> str:
        return f"Keys(seed={self.seed})"


@pytest.fixture
def keys(request: pytest.FixtureRequest) -> Keys:
    """PRNG keys that differ between tests and not between runs; `--seed N` tries others."""
    seed = request.config.getoption("--seed")
    used = Keys(zlib.crc32(request.node.nodeid.encode()) if seed is None else seed)
    request.node.stash[KEYS_USED] = used
    return used


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and (used := item.stash.get(KEYS_USED, None)) is not None:
        report.sections.append(("PRNG keys", f"the keys came from --seed={used.seed}"))
    return report


# Of these folders, where programs are small and most run once: making them fast took a third of the time and more.
SMALL = ("cli", "core", "docs", "examples", "front_ends", "inits", "interop", "kernels", "third_party")


# Of a module, so that it holds while fixtures of modules are made.
@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.parent.name not in SMALL or request.config.option.markexpr == "gpu":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def strict_jax() -> Iterator[None]:
    """Makes implicit dtype and rank promotion errors.

    For tests of this project's own arithmetic. Not for all tests, because third-party models rely on promotion.
    """
    import jax

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New torch tensors start as NaN, so that an element nobody writes is seen."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
