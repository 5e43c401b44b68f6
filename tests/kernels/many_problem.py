"""A linear layer with an adapter for each run of rows, its exact answers in float64, and what a good bound refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax import reference
from tests.kernels.problems import BF16, normal


@dataclass(frozen=True)
class ManyProblem:
    """`runs` runs of `run` rows each; operands as in `problems.Problem`."""

    runs: int
    run: int
    k: int
    n: int
    r: int
    dtype: Any = BF16
    transposed: bool = False

    def operands(self) -> dict[str, np.ndarray]:
        """`x` (M, K), `w` (K, N), `a` (runs, K, R), `b` (runs, R, N), `dy` (M, N)."""
        m, spread = self.runs * self.run, {"dtype": self.dtype, "spread": self.k**-0.5}
        return {
            "x": normal(m, self.k, dtype=self.dtype, seed=5),
            "w": normal(self.k, self.n, seed=2, **spread),
            "a": normal(self.runs, self.k, self.r, seed=3, **spread),
            "b": normal(self.runs, self.r, self.n, dtype=self.dtype, seed=4),
            "dy": normal(m, self.n, dtype=self.dtype, seed=6),
        }

    def answers(self, shift: int = 0, scale: float = 1.0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """`{"y" | "x" | "a" | "b": (value or gradient, bound)}`; with a shift, of runs that took others' factors."""
        every = self.operands()
        found: dict[str, list[Any]] = {name: [] for name in ("y", "x", "a", "b")}
        for i in range(self.runs):
            rows, other = slice(i * self.run, (i + 1) * self.run), (i + shift) % self.runs
            mine = every["x"][rows], every["w"], every["a"][other], every["b"][other], every["dy"][rows]
            for name, answer in reference.fused(*mine, self.dtype, scale).items():
                found[name].append(answer)
        joined = {name: np.concatenate if name in "yx" else np.stack for name in found}
        return {name: tuple(joined[name](part) for part in zip(*each, strict=True)) for name, each in found.items()}  # type: ignore[return-value]

    def check(self, results: dict[str, Any]) -> None:
        """Each result within its bound, which others' factors, half an adapter and none break."""
        answers = self.answers()
        mistakes = {"others' factors": {"shift": 1}, "half the scale": {"scale": 0.5}, "no adapter": {"scale": 0.0}}
        for name, got in results.items():
            want, bound = answers[name]
            got = np.asarray(got).astype(np.float64)
            assert got.shape == want.shape, (name, got.shape, want.shape)
            assert reference.excess(got, want, bound) <= 1, (name, reference.excess(got, want, bound))
            for mistake, options in mistakes.items():
                wrong = self.answers(**options)[name][0]
                assert reference.excess(wrong, want, bound) > 1, (name, mistake)
