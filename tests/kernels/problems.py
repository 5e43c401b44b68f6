"""Random problems for the kernels, the exact answers in float64, and answers that a good bound must refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax import reference

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
SEED = (123456789, 0xDEADBEEF)
Answers = dict[str, tuple[np.ndarray, np.ndarray]]


def normal(*shape: int, dtype: Any = BF16, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    """A function of its arguments, so that a failing case can be repeated alone."""
    return (spread * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(dtype)


def mixed(v: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser on uint32."""
    v = (v ^ (v >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    v = (v ^ (v >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return v ^ (v >> np.uint32(16))


def drawn(shape: tuple[int, int], seed: tuple[int, int] = SEED, origin: tuple[int, int] = (0, 0)) -> np.ndarray:
    """16 bits for each element, from the formula in the documentation and not from the library."""
    rows = np.arange(origin[0], origin[0] + shape[0], dtype=np.uint32)[:, None]
    columns = np.arange(origin[1], origin[1] + shape[1], dtype=np.uint32)[None]
    pair = (columns // np.uint32(128)) * np.uint32(64) + columns % np.uint32(64)
    key, v = rows * np.uint32(0x9E3779B9) + np.uint32(seed[1]), pair * np.uint32(0x85EBCA6B) + np.uint32(seed[0])
    word = (mixed(key) | np.uint32(1)) * ((v ^ v >> np.uint32(16)) * np.uint32(0xC2B2AE35) | np.uint32(1)) + key
    factor = np.where(columns // 64 % 2 == 1, np.uint32(0x27D4EB2F), np.uint32(0xC2B2AE35))
    return (word ^ word >> np.uint32(16)) * factor >> np.uint32(16) ^ np.uint32(0x8000)


def seed_words(seed: tuple[int, int] = SEED, origin: tuple[int, int] = (0, 0)) -> np.ndarray:
    """The four int32 that kernels take."""
    return np.array([*seed, *origin], np.uint32).view(np.int32)


def mask(shape: tuple[int, int], threshold: int, seed: tuple[int, int] = SEED) -> np.ndarray:
    """0 or 1 / (the share that is kept)."""
    return (drawn(shape, seed) >= threshold) * (65536 / (65536 - threshold))


@dataclass(frozen=True)
class Problem:
    """A linear layer with its adapter, all operands of one dtype, the scale already in `b`."""

    m: int
    k: int
    n: int
    r: int
    dtype: Any = BF16
    threshold: int = 0
    transposed: bool = False
    bias_dtype: Any = None  # None: no bias

    def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """`x`, `w`, `a`, `b`, `dy`. Factors as large as the weight is, so that no part of a result is small."""
        spread = {"dtype": self.dtype, "spread": self.k**-0.5}
        w = normal(self.k, self.n, seed=2, **spread)
        a, b = normal(self.k, self.r, seed=3, **spread), normal(self.r, self.n, dtype=self.dtype, seed=4)
        x, dy = (normal(self.m, width, dtype=self.dtype, seed=5) for width in (self.k, self.n))
        return x, w, a, b, dy

    def bias(self) -> np.ndarray | None:
        return None if self.bias_dtype is None else normal(self.n, dtype=self.bias_dtype, seed=6)

    def answers(self, scale: float = 1.0, threshold: int | None = None, biases: int = 1) -> Answers:
        """`{"y" | "x" | "a" | "b": (value or gradient, bound)}`; of a mistake, if the arguments say so."""
        cut = self.threshold if threshold is None else threshold
        x, w, a, b, dy = self.operands()
        bias = 0.0 if self.bias_dtype is None else biases * np.asarray(self.bias()).astype(np.float64)
        return reference.fused(x, w, a, b, dy, self.dtype, scale, mask(x.shape, cut) if cut else None, bias)

    def stored(self, w: np.ndarray) -> np.ndarray:
        return w.T.copy() if self.transposed else w

    def check(self, got: dict[str, Any]) -> None:
        """`got` is right, and what a bug might give is not."""
        answers = self.answers()
        for name, value in got.items():
            assert reference.excess(value, *answers[name]) <= 1, name
        mistakes = {"no adapter": self.answers(0.0), "half the scale": self.answers(0.5)}
        if self.threshold:
            mistakes["no mask"] = self.answers(threshold=0)
        for mistake, wrong in mistakes.items():
            for name in got:
                assert reference.excess(wrong[name][0], *answers[name]) > 1, (name, mistake)
        if self.bias_dtype is not None and "y" in got:
            for times in (0, 2):
                assert reference.excess(self.answers(biases=times)["y"][0], *answers["y"]) > 1, f"bias {times} times"


@dataclass(frozen=True)
class GroupProblem:
    """Several linear layers that share `x` and its mask; all but the first with a float32 bias."""

    m: int
    k: int
    ns: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: Any = BF16
    threshold: int = 0

    def operands(self) -> tuple[np.ndarray, list[Any], list[Any], list[Any], list[Any], list[Any]]:
        """`x`, and of each layer `w`, `a`, `b`, `bias` and `dy`."""
        small = {"dtype": self.dtype, "spread": self.k**-0.5}
        ws, a_s, b_s, biases, dys = [], [], [], [], []
        for i, (n, r) in enumerate(zip(self.ns, self.ranks, strict=True)):
            ws.append(normal(self.k, n, seed=10 + i, **small))
            a_s.append(normal(self.k, r, seed=20 + i, **small))
            b_s.append(normal(r, n, dtype=self.dtype, seed=30 + i))
            biases.append(normal(n, dtype=np.float32, seed=40 + i) if i else None)
            dys.append(normal(self.m, n, dtype=self.dtype, seed=50 + i))
        return normal(self.m, self.k, dtype=self.dtype, seed=5), ws, a_s, b_s, biases, dys

    def answers(self, scale: float = 1.0, threshold: int | None = None, left_out: int | None = None) -> Any:
        """`(of x, [of each layer y, a and b])`, with bounds; of a mistake, if the arguments say so."""
        cut = self.threshold if threshold is None else threshold
        x, *layers = self.operands()
        drawn_mask = mask(x.shape, cut) if cut else None
        each = [
            reference.fused(x, w, a, b, dy, self.dtype, scale, drawn_mask, 0.0 if bias is None else bias)
            for w, a, b, bias, dy in zip(*layers, strict=True)
        ]
        parts = [answers["x"] for i, answers in enumerate(each) if i != left_out]
        return tuple(sum(part[i] for part in parts) for i in range(2)), each

    def check(self, dx: Any, ys: Any, das: Any, dbs: Any) -> None:
        """They are right, and what a bug might give is not."""
        (want, bound), each = self.answers()
        assert reference.excess(dx, want, bound) <= 1, "x"
        mistakes = {"no adapter": {"scale": 0.0}, "half the scale": {"scale": 0.5}}
        mistakes |= {f"without layer {i}": {"left_out": i} for i in range(len(self.ns))}
        mistakes |= {"no mask": {"threshold": 0}} if self.threshold else {}
        for name, options in mistakes.items():
            (wrong, _), wrongs = self.answers(**options)
            assert reference.excess(wrong, want, bound) > 1, name
            for i, found in enumerate(zip("yab", (ys, das, dbs), strict=True) for _ in self.ns):
                for letter, values in found:
                    assert reference.excess(values[i], *each[i][letter]) <= 1, (letter, i)
                    if "layer" not in name:
                        assert reference.excess(wrongs[i][letter][0], *each[i][letter]) > 1, (letter, i, name)
