"""GPTQ and SparseGPT as their papers have them, in float64: one inverse of the Hessian, from which each input that is
done is taken out by Gaussian elimination. No Cholesky factor, and a pass over one output (a row of theirs) at a time.
"""

from typing import Any

import numpy as np


def inverse(hessian: np.ndarray, damp: float) -> np.ndarray:
    return np.linalg.inv(hessian + damp * np.mean(np.diag(hessian)) * np.eye(len(hessian)))


def without(inv: np.ndarray, i: int) -> np.ndarray:
    """The inverse of the Hessian without input `i` (GPTQ, eq. 3)."""
    return inv - np.outer(inv[:, i], inv[i]) / inv[i, i]


def pivots(hessian: np.ndarray, damp: float) -> np.ndarray:
    """What the diagonal of the inverse is for each input when all before it are out."""
    inv, found = inverse(hessian, damp), []
    for i in range(len(inv)):
        found.append(inv[i, i])
        inv = without(inv, i)
    return np.asarray(found)


def gptq(
    w: np.ndarray, hessian: np.ndarray, damp: float, scale: np.ndarray, zero: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and how far each was from the code next to it, in steps. `scale` and `zero` are of each weight."""
    w, inv = w.copy(), inverse(hessian, damp)
    codes, ties = np.zeros(w.shape, int), np.ones(w.shape)
    for i in range(len(w)):
        exact = w[i] / scale[i]
        codes[i] = np.clip(np.rint(exact) + zero[i], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        ties[i] = np.abs(np.abs(exact - np.rint(exact)) - 0.5)
        error = (w[i] - (codes[i] - zero[i]) * scale[i]) / inv[i, i]
        w[i:] -= np.outer(inv[i:, i], error)
        inv = without(inv, i)
    return codes, ties


def sparsegpt(
    w: np.ndarray,
    hessian: np.ndarray,
    damp: float,
    *,
    sparsity: float | None = None,
    kept: tuple[int, int] | None = None,
    rounded: Any = lambda i, row: row,
    columns: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and which are gone."""
    w, inv, pivot = w.copy(), inverse(hessian, damp), pivots(hessian, damp)[:, None]
    gone, made = np.zeros(w.shape, bool), np.zeros(w.shape)
    for i in range(len(w)):
        if sparsity is not None and i % columns == 0:
            cost = w[i : i + columns] ** 2 / pivot[i : i + columns]
            gone[i : i + columns] = cost <= np.sort(cost, axis=None)[int(cost.size * sparsity)]
        if kept is not None and i % kept[1] == 0:
            cost = w[i : i + kept[1]] ** 2 / pivot[i : i + kept[1]]
            gone[i : i + kept[1]] = cost < np.sort(cost, axis=0)[kept[1] - kept[0]]
        made[i] = rounded(i, np.where(gone[i], 0, w[i]))
        w[i:] -= np.outer(inv[i:, i], (w[i] - made[i]) / inv[i, i])
        inv = without(inv, i)
    return made, gone


def output_error(w: np.ndarray, made: np.ndarray, hessian: np.ndarray) -> float:
    off = w - made
    return float(np.trace(off.T @ hessian @ off) / np.trace(w.T @ hessian @ w))
