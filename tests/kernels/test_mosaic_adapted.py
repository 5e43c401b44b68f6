"""The product that computes its thin one itself, under Pallas' GPU interpreter: one cluster, which waits for nobody."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax import reference
from lora_jax.kernels.mosaic_adapted import CTA_M, RANK, adapted
from tests.kernels.problems import BF16, F16, mask, normal, seed_words
from tests.kernels.semaphores import counted

THRESHOLD = 26214  # 40 % dropped: a forgotten mask shows


@pytest.mark.parametrize(
    "m, k, n, transposed, masked, biased, dtype",
    [
        # Two rows of tiles and two columns, both cut at the end: first tiles in two turns, and others.
        (328, 320, 320, False, False, np.float32, BF16),
        (200, 384, 320, True, True, None, F16),
    ],
)
def test_adapted(m, k, n, transposed, masked, biased, dtype, monkeypatch):
    x, w = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype, spread=k**-0.5, seed=1)
    a, b = normal(k, RANK, dtype=dtype, spread=k**-0.5, seed=2), normal(RANK, n, dtype=dtype, seed=3)
    bias = None if biased is None else normal(n, dtype=biased, seed=4)
    drop = {"seed": jnp.asarray(seed_words()), "threshold": THRESHOLD} if masked else {}
    stored = w.T.copy() if transposed else w
    with counted(monkeypatch) as (written, waits):
        options = {"transposed": transposed, "bias": bias, "sms": 2, "interpret": plgpu.InterpretGPUParams(), **drop}
        y, h = adapted(x, stored, a.T.copy(), b, **options)
        y, h = np.asarray(y), np.asarray(h)
    rows = -(-m // CTA_M)
    # Of each row of tiles both warpgroups of both CTAs have written their shares; and of `h`, those of one.
    assert written == {**dict.fromkeys(range(rows), 4), rows: 2 * rows}
    # They wait for all shares; and for all of `h`, before they load any of it, the two CTAs that have other tiles.
    assert waits == {**dict.fromkeys([(row, 4) for row in range(rows)], 4), (rows, 2 * rows): 2}
    assert h.shape == (RANK, rows * CTA_M) and not h[:, m:].any()

    x, w, a, b = (v.astype(np.float64) for v in (x, w, a, b))
    thin = x @ a
    bound = reference.tolerance(dtype, k) * (abs(x) @ abs(a))
    assert reference.excess(h[:, :m].T, thin, bound) <= 1
    for wrong in (x[:, 64:] @ a[64:], x[:, :-64] @ a[:-64], np.roll(thin, 64, 0)):
        assert reference.excess(wrong, thin, bound) > 1
    kept = mask((m, n), THRESHOLD) if masked else 1.0
    added = 0.0 if bias is None else bias.astype(np.float64)
    base, low = x @ w, thin @ b
    want = base + kept * low + added
    bound = reference.tolerance(dtype, k + RANK) * (
        abs(x) @ abs(w) + kept * (abs(x) @ abs(a) @ abs(b)) + abs(added)
    )  # fmt: skip
    assert reference.excess(y, want, bound) <= 1
    mistakes = [base + added, base + kept * low / 2 + added, kept * low + added]
    mistakes += [base + low] if masked else [base + low + 2 * added, base + low]
    for wrong in mistakes:
        assert reference.excess(wrong, want, bound) > 1


@pytest.mark.parametrize("runs, run", [(3, 128), (1, 256)])
def test_of_runs(runs, run, monkeypatch):
    """Factors of each half of a tile, of which the last lies beyond all rows, and those of a whole one."""
    m, k, n = runs * run, 320, 320
    x, w = normal(m, k), normal(k, n, spread=k**-0.5, seed=1)
    a, b = normal(runs, RANK, k, spread=k**-0.5, seed=2), normal(runs, RANK, n, seed=3)
    with counted(monkeypatch):
        y, h = adapted(x, w, a, b, sms=2, interpret=plgpu.InterpretGPUParams())
    x, w, a, b = (v.astype(np.float64) for v in (x, w, a, b))
    rows, thin = x.reshape(runs, run, k), np.asarray(h).astype(np.float64)[:, :m]

    def value(shift):
        low = rows @ np.roll(a, shift, 0).swapaxes(1, 2)
        return low.reshape(m, RANK), x @ w + (low @ np.roll(b, shift, 0)).reshape(m, n)

    (want_h, want), sizes = value(0), abs(rows) @ abs(a).swapaxes(1, 2)
    h_bound = reference.tolerance(BF16, k) * sizes.reshape(m, RANK)
    bound = reference.tolerance(BF16, k + RANK) * (abs(x) @ abs(w) + (sizes @ abs(b)).reshape(m, n))
    assert reference.excess(thin.T, want_h, h_bound) <= 1 and reference.excess(np.asarray(y), want, bound) <= 1
    wrong_h, wrong = value(1) if runs > 1 else (want_h / 2, x @ w)
    assert reference.excess(wrong_h, want_h, h_bound) > 1 and reference.excess(wrong, want, bound) > 1
