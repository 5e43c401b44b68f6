"""Norms, singular values and distances of low-rank products B @ A, computed without ever forming a product.

Letters: m output features, n input features, r rank. `b` is (m, r), `a` is (r, n), everything in float64.
Costs are O((m + n) r^2): a 4096 x 4096 matrix of rank 16 is answered from two 16 x 16 ones.
"""

from __future__ import annotations

import numpy as np


def frobenius(b: np.ndarray, a: np.ndarray) -> float:
    """||B A||_F, as sqrt(sum((B^T B) * (A A^T))): both Grams are (r, r)."""
    squared = np.sum((b.T @ b) * (a @ a.T))
    # Rounding can leave a tiny negative sum where B A is exactly zero. A NaN stays a NaN.
    return float(np.sqrt(np.maximum(squared, 0.0)))


def singular_values(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """All nonzero singular values of B A, descending: those of R_B R_A^T, with B = Q_B R_B and A^T = Q_A R_A.

    **Returns:** (min(m, n, r),); filled with NaN if a factor is not finite.
    """
    if not (np.isfinite(b).all() and np.isfinite(a).all()):
        return np.full(min(b.shape[0], a.shape[1], b.shape[1]), np.nan)
    r_b, r_a = (np.asarray(np.linalg.qr(x, mode="r")) for x in (b, a.T))
    core = r_b @ r_a.T
    return np.linalg.svd(core, compute_uv=False)


def inner(b1: np.ndarray, a1: np.ndarray, b2: np.ndarray, a2: np.ndarray) -> float:
    """<B1 A1, B2 A2>_F = sum((B1^T B2) * (A1 A2^T)); the ranks may differ."""
    return float(np.sum((b1.T @ b2) * (a1 @ a2.T)))


def distance(b1: np.ndarray, a1: np.ndarray, b2: np.ndarray, a2: np.ndarray) -> float:
    """||B1 A1 - B2 A2||_F, from a QR of the stacked factors.

    Not sqrt(|X|^2 + |Y|^2 - 2<X, Y>): that loses half the digits when X is close to Y.
    """
    values = singular_values(np.concatenate([b1, -b2], axis=1), np.concatenate([a1, a2], axis=0))
    return float(np.sqrt(np.sum(values**2)))


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values: k equal ones give k, and no update gives 0.

    **Source:** Roy & Vetterli, "The effective rank", EUSIPCO 2007.
    """
    total = values.sum()
    if not total > 0:
        return float(total)  # 0 where there is no update, NaN where there are NaNs
    p = values[values > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def principal_angles(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Principal angles in radians, large to small, between the column spaces of two products B A, and between the row
    spaces.

    **Returns:** (min(rank1, rank2),) twice, with the ranks that the products really have: empty if one is zero.
    """
    from scipy.linalg import subspace_angles  # slow to import

    (u1, v1), (u2, v2) = singular_vectors(*one), singular_vectors(*other)
    if not u1.shape[1] or not u2.shape[1]:
        return np.zeros(0), np.zeros(0)
    return subspace_angles(u1, u2), subspace_angles(v1, v2)


def singular_vectors(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, k) and (n, k): the left and right singular vectors of B A whose singular values rise above rounding."""
    (q_b, r_b), (q_a, r_a) = np.linalg.qr(b), np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    rank = int(np.sum(s > s[0] * max(b.shape[0], a.shape[1]) * np.finfo(np.float64).eps))
    return q_b @ u[:, :rank], q_a @ vt[:rank].T
