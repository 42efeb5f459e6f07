"""Tables of runs drawn from known laws, and the shared data that some tests read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
"""Hoffmann et al. 2022, equation 10."""
REPLICATED = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
"""Besiroglu et al. 2024, their refit of the same data."""
OPTIMA = Path(__file__).resolve().parents[4] / "shared" / "data" / "porian_optimal_pairs.csv"
needs_optima = pytest.mark.skipif(not OPTIMA.exists(), reason=f"needs {OPTIMA.name}, derived from Porian et al.'s data")


def loss_of(truth: dict[str, float], params: Any, tokens: Any) -> Any:
    return truth["E"] + truth["A"] * params ** -truth["alpha"] + truth["B"] * tokens ** -truth["beta"]


def best_size(truth: dict[str, float], flops: Any) -> Any:
    """The closed form of Hoffmann et al. 2022, equation 4."""
    alpha, beta = truth["alpha"], truth["beta"]
    ratio = (alpha * truth["A"] / (beta * truth["B"])) ** (1 / (alpha + beta))
    return ratio * (flops / 6) ** (beta / (alpha + beta))


def isoflop_table(
    truth: dict[str, float],
    *,
    noise: float = 0.0,
    seed: int = 0,
    budgets: int = 6,
    sizes: int = 7,
    flops: tuple[float, float] = (1e18, 1e21),
    reach: float = 10.0,
    shift: tuple[float, float] = (1.0, 1.0),
) -> dict[str, Any]:
    """Runs at several budgets, of sizes up to `reach` times below and above the best one, that moved by `shift`."""
    compute = np.geomspace(*flops, budgets)[:, None]
    off = np.geomspace(*shift, budgets)[:, None]
    params = best_size(truth, compute) * off * np.geomspace(1 / reach, reach, sizes)
    tokens = compute / 6 / params
    return noisy(truth, params.ravel(), tokens.ravel(), noise, seed)


def grid_table(truth: dict[str, float], *, noise: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """Six sizes, each with six numbers of tokens."""
    params, tokens = np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 3e10, 6))
    return noisy(truth, params.ravel(), tokens.ravel(), noise, seed)


def noisy(truth: dict[str, float], params: Any, tokens: Any, noise: float, seed: int) -> dict[str, Any]:
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(len(params)))
    return {"params": params, "tokens": tokens, "loss": loss_of(truth, params, tokens) * factor}
