"""Profile intervals: how far a quantity can be moved before the law, refitted around it, fits the table badly.

They follow the objective's own shape, so they need no symmetry, stop at E = 0, and grow without end where a table says
nothing. Twice the excess of the Huber loss over its minimum, in units of E[ψ²]/E[ψ'], is that of one squared normal
deviate (Schrader and Hettmansperger 1980); for δ → ∞ it is the likelihood ratio of least squares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cramjax.scaling.fit.law import Array, Functional, Law, Pull, curvature_scale, minimise, noise_of

_ROUNDS = 12
_STIFFNESS = 100.0
_CLOSE = 0.005


@dataclass(frozen=True)
class Estimate:
    """A fitted law and what its residuals say of the noise.

    Attributes:
        law: the table.
        theta: the best coefficients (E, a, b, α, β).
        objective: the Huber loss there, summed over rows.
        noise: standard deviation of log L.
        covariance: of the coefficients, by linearisation.
    """

    law: Law
    theta: Array
    objective: float
    noise: float
    covariance: Array

    @property
    def freedom(self) -> int:
        """Rows beyond the five coefficients."""
        return len(self.law.x) - 5


def estimate(law: Law, theta: Array) -> Estimate:
    """What is known at a minimum.

    Args:
        law: the table.
        theta: coefficients [5].
    """
    objective = float(law.objective(theta[None])[0])
    rows = len(law.x)
    noise = noise_of(objective, rows, 5, law.delta) if rows > 5 else np.inf
    _, jacobian = law.derivatives(theta[None])
    information = jacobian[0].T @ jacobian[0]
    scale = np.sqrt(np.diag(information))
    scale = np.where(scale > 0, scale, 1.0)
    inverse = np.linalg.pinv(information / np.outer(scale, scale), rcond=1e-14) / np.outer(scale, scale)
    # The variance of an M-estimator: E[ψ²]/E[ψ']², which the linearised covariance is multiplied with.
    spread = curvature_scale(noise, law.delta) / _inside(noise, law.delta) if rows > 5 else np.inf
    return Estimate(law, theta, objective, noise, inverse * spread if rows > 5 else np.full((5, 5), np.inf))


def _inside(noise: float, delta: float) -> float:
    return float(1 - 2 * stats.norm.sf(delta / noise))


def profile(fit: Estimate, quantities: Sequence[Functional], criticals: Sequence[float]) -> Array:
    """The ends of each quantity's interval: [quantity, 2], infinite where no value fits the table badly enough.

    Args:
        fit: the minimum.
        quantities: to bound.
        criticals: the deviate at the interval's ends, one a quantity.
    """
    count = len(quantities)
    side = np.tile([-1.0, 1.0], count)
    critical = np.repeat(np.asarray(criticals, dtype=np.float64), 2)

    def quantity(theta: Array) -> tuple[Array, Array]:
        parts = [q(theta[2 * i : 2 * i + 2]) for i, q in enumerate(quantities)]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    theta = np.tile(fit.theta, (2 * count, 1))
    best, gradient = quantity(theta)
    error = np.sqrt(np.maximum(np.einsum("pi,ij,pj->p", gradient, fit.covariance, gradient), 0))
    error = np.where(error > 0, error, 1.0)  # the table says nothing of it: any scale will do to find that out
    scale = curvature_scale(fit.noise, fit.law.delta)
    stiffness = _STIFFNESS * scale / error**2
    # Distances from the estimate, inside and outside of the end; the deviate is nearly proportional to the distance.
    near, near_deviate = np.zeros(2 * count), np.zeros(2 * count)
    far, far_deviate = np.full(2 * count, np.inf), np.full(2 * count, np.inf)
    reach = critical * error
    for _ in range(_ROUNDS):
        theta = minimise(fit.law, theta, pull=Pull(quantity, best + side * reach, stiffness), iterations=60)
        distance = side * (quantity(theta)[0] - best)
        deviate = np.sqrt(np.maximum(2 * (fit.law.objective(theta) - fit.objective) / scale, 0))
        inside = deviate < critical * (1 - _CLOSE)  # what is close enough bounds the interval, from either side
        grew = inside & (distance > near)
        near, near_deviate = np.where(grew, distance, near), np.where(grew, deviate, near_deviate)
        closer = ~inside & (distance < far)
        far, far_deviate = np.where(closer, distance, far), np.where(closer, deviate, far_deviate)
        if np.all((np.abs(deviate - critical) < _CLOSE * critical) | (inside & ~grew)):
            break
        bounded = np.isfinite(far)
        with np.errstate(invalid="ignore", divide="ignore"):
            between = near + (far - near) * (critical - near_deviate) / (far_deviate - near_deviate)
            outward = near * np.clip(critical / np.maximum(near_deviate, 1e-300), 1.05, 4.0)
        reach = np.where(bounded, between, np.where(near > 0, outward, reach * 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        between = near + (far - near) * (critical - near_deviate) / (far_deviate - near_deviate)
    end = np.where(np.isfinite(far), between, np.inf)
    return (best + side * end).reshape(count, 2)


def pick(index: int) -> Functional:
    """One of the coefficients as a quantity."""

    def quantity(theta: Array) -> tuple[Array, Array]:
        gradient = np.zeros_like(theta)
        gradient[:, index] = 1.0
        return theta[:, index], gradient

    return quantity


def correlation(covariance: Array) -> Array:
    """The correlations of a covariance; none with a coefficient that the table says nothing of."""
    error = np.sqrt(np.maximum(np.diag(covariance), 0))
    error = np.where(error > 0, error, np.inf)
    out = covariance / error[:, None] / error[None, :]
    return np.where(np.eye(len(out), dtype=bool), 1.0, out)


def critical_value(correlations: Array, freedom: int, level: float) -> float:
    """The deviate that the largest of several correlated t-distributed deviations stays below.

    Args:
        correlations: of the estimates [k, k].
        freedom: degrees of freedom of the noise.
        level: the probability, such as 0.95.
    """
    draws = np.random.default_rng(0)
    normal = draws.multivariate_normal(np.zeros(len(correlations)), correlations, size=40_000, check_valid="ignore")
    return float(np.quantile(np.abs(normal).max(-1) / np.sqrt(draws.chisquare(freedom, 40_000) / freedom), level))
