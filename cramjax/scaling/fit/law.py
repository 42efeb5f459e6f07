"""The law L = E + A/N^α + B/D^β against a table, and the solver that fits it: many problems at once, in plain numpy.

Coefficients are rows (E, a, b, α, β), where a and b are the logarithms of the two terms at the table's geometric mean
size and token count: unlike log A and log B they hardly depend on α and β, and the normal equations are well scaled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Array = NDArray[np.float64]
Rows = NDArray[Any]

COEFFICIENTS = ("E", "A", "B", "alpha", "beta")
_LOWER = np.array([0.0, -50.0, -50.0, 1e-4, 1e-4])
_UPPER = np.array([np.inf, 50.0, 50.0, 10.0, 10.0])
_LONGEST_STEP = np.array([2.0, 2.0, 2.0, 0.5, 0.5])
NOISE_FLOOR = 1e-9
"""Least noise of log L that a table is credited with: what rounding in float64 leaves, and to spare."""


@dataclass(frozen=True)
class Law:
    """The law's residuals and Huber objective on one table.

    Attributes:
        log_params: log N of each row.
        log_tokens: log D of each row.
        log_loss: log L of each row.
        delta: where the Huber loss of a residual of log L turns from a parabola into a line.
    """

    log_params: Array
    log_tokens: Array
    log_loss: Array
    delta: float

    @cached_property
    def mean_params(self) -> float:
        """The mean of log N, where `a` is taken."""
        return float(self.log_params.mean())

    @cached_property
    def mean_tokens(self) -> float:
        """The mean of log D, where `b` is taken."""
        return float(self.log_tokens.mean())

    @cached_property
    def x(self) -> Array:
        """Log N from its mean."""
        return self.log_params - self.mean_params

    @cached_property
    def z(self) -> Array:
        """Log D from its mean."""
        return self.log_tokens - self.mean_tokens

    def natural(self, theta: Array) -> Array:
        """Rows (E, A, B, α, β) of rows (E, a, b, α, β)."""
        out = np.array(theta, dtype=np.float64)
        out[..., 1] = np.exp(theta[..., 1] + theta[..., 3] * self.mean_params)
        out[..., 2] = np.exp(theta[..., 2] + theta[..., 4] * self.mean_tokens)
        return out

    def centred(self, natural: Array) -> Array:
        """The inverse of `natural`."""
        out = np.array(natural, dtype=np.float64)
        with np.errstate(divide="ignore"):
            out[..., 1] = np.log(natural[..., 1]) - natural[..., 3] * self.mean_params
            out[..., 2] = np.log(natural[..., 2]) - natural[..., 4] * self.mean_tokens
        return np.clip(out, _LOWER, _UPPER)

    def residuals(self, theta: Array) -> Array:
        """What log L exceeds the law by: [problem, row] for coefficients [problem, 5]."""
        total, _, _ = self._terms(theta)
        return self.log_loss - np.log(total)

    def derivatives(self, theta: Array) -> tuple[Array, Array]:
        """Residuals, and the Jacobian of the law's log L: [problem, row] and [problem, row, 5]."""
        total, by_params, by_tokens = self._terms(theta)
        share, other = by_params / total, by_tokens / total
        jacobian = np.stack([1 / total, share, other, -self.x * share, -self.z * other], axis=-1)
        return self.log_loss - np.log(total), jacobian

    def part(self, every: int) -> "Law":
        """The law on every nth row; coefficients mean the same."""
        if every == 1:
            return self
        part = Law(self.log_params[::every], self.log_tokens[::every], self.log_loss[::every], self.delta)
        part.__dict__.update(mean_params=self.mean_params, mean_tokens=self.mean_tokens)
        return part

    def objective(self, theta: Array) -> Array:
        """The Huber loss of the residuals, summed over rows: one number a problem."""
        return huber(self.residuals(theta), self.delta).sum(-1)

    def _terms(self, theta: Array) -> tuple[Array, Array, Array]:
        by_params = np.exp(np.clip(theta[:, 1:2] - theta[:, 3:4] * self.x, -300, 300))
        by_tokens = np.exp(np.clip(theta[:, 2:3] - theta[:, 4:5] * self.z, -300, 300))
        return theta[:, 0:1] + by_params + by_tokens, by_params, by_tokens


def huber(residuals: Array, delta: float) -> Array:
    """Half the square of a residual up to δ, and a line of slope δ beyond."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


Functional = Callable[[Array], tuple[Array, Array]]
"""Values [problem] and gradients [problem, 5] of a quantity, from coefficients [problem, 5]."""


@dataclass(frozen=True)
class Pull:
    """Springs that hold one quantity of each problem near a value: half `stiffness` times the squared distance."""

    quantity: Functional
    target: Array
    stiffness: Array

    def part(self, rows: Rows) -> "Pull":
        """The springs of some of the problems."""

        def quantity(theta: Array) -> tuple[Array, Array]:
            everything = np.broadcast_to(theta[:1], (len(self.target), theta.shape[1])).copy()
            everything[rows] = theta
            value, gradient = self.quantity(everything)
            return value[rows], gradient[rows]

        return Pull(quantity, self.target[rows], self.stiffness[rows])


def minimise(
    law: Law,
    theta: Array,
    *,
    weights: Array | None = None,
    pull: Pull | None = None,
    iterations: int = 200,
) -> Array:
    """Minimise the Huber objective from many starts, or of many weighted copies of a table, all at once.

    Damped Newton steps on the law's linearisation (Gauss–Newton inside δ; the damping is the curvature of the parabolas
    that lie above the Huber loss, so a fully damped step never overshoots the linearised problem), projected on E ≥ 0.

    Args:
        law: the table.
        theta: starts [problem, 5].
        weights: of rows [problem, row]; default: one each.
        pull: springs added to the objective.
        iterations: most steps of a problem.

    Returns:
        Coefficients [problem, 5] that are no worse than the starts.
    """
    theta = np.clip(np.array(theta, dtype=np.float64), _LOWER, _UPPER)
    damping = np.ones(len(theta))
    left = np.arange(len(theta))
    here = _Problem(law, weights, pull)
    value = here.value(theta)
    for _ in range(iterations):
        part = here.part(left)
        step, predicted = part.step(theta[left], damping[left])
        there = np.clip(theta[left] + step, _LOWER, _UPPER)
        reached = part.value(there)
        better = reached < value[left]
        small = predicted <= 1e-13 * np.abs(value[left]) + 1e-32
        theta[left[better]] = there[better]
        gain = value[left] - reached
        value[left[better]] = reached[better]
        damping[left] *= np.where(better, np.where(gain > 0.5 * predicted, 0.2, 0.7), 5.0)
        damping[left] = np.clip(damping[left], 1e-12, 1e12)
        left = left[~(small | (~better & (damping[left] >= 1e8)))]
        if len(left) == 0:
            break
    return theta


@dataclass(frozen=True)
class _Problem:
    law: Law
    weights: Array | None
    pull: Pull | None

    def part(self, rows: Rows) -> "_Problem":
        weights = None if self.weights is None else self.weights[rows]
        return _Problem(self.law, weights, None if self.pull is None else self.pull.part(rows))

    def value(self, theta: Array) -> Array:
        losses = huber(self.law.residuals(theta), self.law.delta)
        value = losses.sum(-1) if self.weights is None else (self.weights * losses).sum(-1)
        if self.pull is not None:
            value = value + 0.5 * self.pull.stiffness * (self.pull.quantity(theta)[0] - self.pull.target) ** 2
        return value

    def step(self, theta: Array, damping: Array) -> tuple[Array, Array]:
        """A step, and what the linearised objective would fall by."""
        residuals, jacobian = self.law.derivatives(theta)
        delta, size = self.law.delta, np.abs(residuals)
        slope = np.clip(residuals, -delta, delta)
        curvature = (size <= delta) + damping[:, None] * np.minimum(1.0, delta / np.maximum(size, 1e-300))
        if self.weights is not None:
            slope, curvature = self.weights * slope, self.weights * curvature
        transposed = jacobian.transpose(0, 2, 1)
        gradient = -(transposed @ slope[:, :, None])[:, :, 0]
        hessian = (transposed * curvature[:, None, :]) @ jacobian
        if self.pull is not None:
            value, direction = self.pull.quantity(theta)
            gradient = gradient + (self.pull.stiffness * (value - self.pull.target))[:, None] * direction
            spring = (self.pull.stiffness * (1 + damping))[:, None, None]
            hessian = hessian + spring * direction[:, :, None] * direction[:, None, :]
        held = ((theta <= _LOWER) & (gradient > 0)) | ((theta >= _UPPER) & (gradient < 0))
        gradient = np.where(held, 0.0, gradient)
        hessian = np.where(held[:, :, None] | held[:, None, :], 0.0, hessian)
        diagonal = np.einsum("pii->pi", hessian)
        scale = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        scaled = hessian / scale[:, :, None] / scale[:, None, :]
        scaled = scaled + (1e-13 + 1e-6 * np.minimum(damping, 1.0))[:, None, None] * np.eye(5)
        scaled = np.where(np.eye(5, dtype=bool) & held[:, None, :], 1.0, scaled)
        step = -np.linalg.solve(scaled, (gradient / scale)[:, :, None])[:, :, 0] / scale
        shrink = np.minimum(1.0, (_LONGEST_STEP / np.maximum(np.abs(step), 1e-300)).min(-1))
        return step * shrink[:, None], -0.5 * (gradient * step).sum(-1) * shrink


def curvature_scale(noise: float, delta: float) -> float:
    """E[ψ²]/E[ψ'] of the Huber loss under normal noise: what its excess over the minimum is counted in.

    Args:
        noise: standard deviation of log L.
        delta: of the Huber loss.
    """
    inside, tail = _normal_shares(noise, delta)
    return (noise**2 * (inside - tail) + delta**2 * (1 - inside)) / inside


def noise_of(objective: float, rows: int, coefficients: int, delta: float) -> float:
    """The standard deviation of log L under which the fitted objective is what one expects.

    Expected at the minimum: rows · E[ρ] − coefficients/2 · E[ψ²]/E[ψ']; for δ → ∞ that is the residual sum of squares
    over the degrees of freedom.

    Args:
        objective: the Huber loss at the minimum, summed over rows.
        rows: of the table; more than coefficients.
        coefficients: that were fitted.
        delta: of the Huber loss.
    """

    def excess(log_noise: float) -> float:
        noise = math.exp(log_noise)
        inside, tail = _normal_shares(noise, delta)
        outside = delta * noise * math.sqrt(2 / math.pi) * math.exp(-0.5 * (delta / noise) ** 2)
        expected = 0.5 * noise**2 * (inside - tail) + outside - 0.5 * delta**2 * (1 - inside)
        return rows * expected - 0.5 * coefficients * curvature_scale(noise, delta) - objective

    if excess(math.log(NOISE_FLOOR)) >= 0:
        return NOISE_FLOOR
    root: Any = brentq(excess, math.log(NOISE_FLOOR), math.log(1e3))
    return math.exp(root)


def _normal_shares(noise: float, delta: float) -> tuple[float, float]:
    """P(|r| < δ), and 2cφ(c) for c = δ over the noise."""
    ratio = delta / noise
    return math.erf(ratio / math.sqrt(2)), ratio * math.sqrt(2 / math.pi) * math.exp(-0.5 * ratio**2)
