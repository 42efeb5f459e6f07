"""The parametric fit L = E + A/N^α + B/D^β (approach 3 of Hoffmann et al. 2022), its optima, and how sure they are."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from cramjax.errors import ConfigError
from cramjax.scaling.fit.intervals import Estimate, correlation, critical_value, estimate, pick, profile
from cramjax.scaling.fit.law import COEFFICIENTS, NOISE_FLOOR, Array, Functional, Law, minimise
from cramjax.scaling.fit.solvers import lbfgs, variable_projection
from cramjax.scaling.fit.table import SIX_ND, Runs
from cramjax.show.numbers import Interval, ends, finite, number, span

LEVEL = 0.95
Solver = Literal["variable-projection", "l-bfgs"]
IntervalMethod = Literal["profile", "bootstrap"]
_WEAK_CONDITION = 1e5
_WEAK_SHARE = 0.5
_BOOTSTRAP_CELLS = 1_000_000


@dataclass(frozen=True)
class FlopsLaw:
    """FLOPs as coefficient · N^exponent · D: 6·N·D, or what the table's own FLOPs say."""

    coefficient: float
    exponent: float
    scatter: float = 0.0
    """The largest share by which a row of the table is off."""


@dataclass(frozen=True)
class Optimum:
    """What a number of FLOPs buys at best.

    Attributes:
        flops: training FLOPs.
        params: the best size.
        tokens: what to train it on.
        loss: what that reaches.
        intervals: 95%, of `params`, `tokens` and `loss` (of a new run's loss: its noise is in it).
    """

    flops: float
    params: float
    tokens: float
    loss: float
    intervals: Mapping[str, Interval]


@dataclass(frozen=True, eq=False, repr=False)
class ParametricFit:
    """L = E + A/N^α + B/D^β and its compute-optimal exponents N* ∝ C^a, D* ∝ C^b.

    Attributes:
        E: the loss that remains: of infinite size and data.
        A: coefficient of size.
        B: coefficient of data.
        alpha: exponent of size.
        beta: exponent of data.
        objective: Huber loss of log L, summed over rows.
        noise: standard deviation of log L around the law.
        a: exponent of the best size.
        b: exponent of the best number of tokens.
        intervals: 95%, by the names above. Profile intervals hold for E, α and β together (so each is wider than it
            would be alone); bootstrap intervals each for itself.
        flops_law: how FLOPs follow from size and tokens.
        runs: the table.
        warnings: what a reader should know.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float
    noise: float
    a: float
    b: float
    intervals: Mapping[str, Interval]
    flops_law: FlopsLaw
    runs: Runs
    warnings: tuple[str, ...]
    estimate: Estimate = field(repr=False)

    def loss(self, params: Any, tokens: Any) -> Any:
        """The law's loss.

        Args:
            params: size, a number or an array.
            tokens: tokens, a number or an array.
        """
        return self.E + self.A * params ** (-self.alpha) + self.B * tokens ** (-self.beta)

    def optimal_params(self, flops: Any) -> Any:
        """The size with the lowest loss at so many FLOPs (a number or an array)."""
        coefficient, power = self.flops_law.coefficient, self.flops_law.exponent
        ratio = self.alpha * self.A / (self.beta * power * self.B)
        return ratio ** (1 / (self.alpha + power * self.beta)) * (flops / coefficient) ** self.a

    def tokens_for(self, params: Any, flops: Any) -> Any:
        """The tokens that a size can be trained on with so many FLOPs."""
        with np.errstate(divide="ignore"):  # of a size next to nothing: infinitely many
            return np.divide(flops, self.flops_law.coefficient * params**self.flops_law.exponent)

    def optimum(self, flops: float) -> Optimum:
        """What a number of FLOPs buys at best, with 95% intervals.

        Args:
            flops: training FLOPs, as the table counts them.
        """
        params = float(self.optimal_params(flops))
        tokens = float(self.tokens_for(params, flops))
        loss = float(self.loss(params, tokens))
        if self.estimate.freedom < 1 or not (self.A > 0 and self.B > 0):
            unknown = {name: (0.0, math.inf) for name in ("params", "tokens", "loss")}
            return Optimum(flops, params, tokens, loss, unknown)
        deviate = float(stats.t.ppf(0.5 + LEVEL / 2, self.estimate.freedom))
        quantities = [_log_size(self, flops), _log_loss(self, flops)]
        size, law = profile(self.estimate, quantities, [deviate] * 2)
        low, high = _exp(size[0]), _exp(size[1])
        reach = deviate * self.noise
        below, above = (math.hypot(end - math.log(loss), reach) for end in law)
        intervals = {
            "params": (low, high),
            "tokens": tuple(float(self.tokens_for(n, flops)) if 0 < n < math.inf else 0.0 for n in (high, low)),
            "loss": (loss * math.exp(-below), loss * _exp(above)),
        }
        return Optimum(flops, params, tokens, loss, intervals)

    @property
    def residuals(self) -> Array:
        """What log L of each row exceeds the law by."""
        return np.log(self.runs.loss) - np.log(self.loss(self.runs.params, self.runs.tokens))

    def json(self) -> dict[str, Any]:
        """Coefficients, exponents, objective and intervals."""
        names = (*COEFFICIENTS, "objective", "noise", "a", "b")
        intervals = {name: ends(interval) for name, interval in self.intervals.items()}
        flops = {"coefficient": self.flops_law.coefficient, "exponent": self.flops_law.exponent}
        return {name: finite(getattr(self, name)) for name in names} | {"intervals": intervals, "flops_law": flops}


def fit_parametric(
    runs: Runs,
    *,
    solver: Solver = "variable-projection",
    intervals: IntervalMethod = "profile",
    delta: float = 1e-3,
    samples: int = 1000,
    seed: int = 0,
) -> ParametricFit:
    """Fit the law by the Huber loss of log L.

    Args:
        runs: the table.
        solver: variable projection, or L-BFGS from the published grid of starts. Both minimise the same objective.
        intervals: from the objective's profile, or percentiles of a bootstrap of rows.
        delta: of the Huber loss.
        samples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ConfigError: fewer rows than coefficients, or rows that cannot tell size from data.
    """
    _check(runs)
    law = Law(np.log(runs.params), np.log(runs.tokens), np.log(runs.loss), delta)
    theta = lbfgs(law) if solver == "l-bfgs" else variable_projection(law)
    fitted = estimate(law, theta)
    values = [float(value) for value in law.natural(theta)]
    flops_law = _flops_law(runs)
    power = flops_law.exponent
    bounds = _profile(fitted, power) if intervals == "profile" else _bootstrap(fitted, power, samples, seed)
    a = values[4] / (values[3] + power * values[4])
    fit = ParametricFit(
        **dict(zip(COEFFICIENTS, values, strict=True)),
        objective=fitted.objective,
        noise=fitted.noise,
        a=a,
        b=1 - power * a,
        intervals=bounds,
        flops_law=flops_law,
        runs=runs,
        warnings=(),
        estimate=fitted,
    )
    return replace(fit, warnings=tuple(_warnings(fit)))


def _check(runs: Runs) -> None:
    if len(runs) < 5:
        raise ConfigError(
            f"the law has 5 coefficients, and the table has {len(runs)} rows: give at least 5 runs, better 20 or more."
        )
    for name, values in ((runs.columns.params, runs.params), (runs.columns.tokens, runs.tokens)):
        if np.ptp(np.log(values)) < 1e-6:
            raise ConfigError(
                f"every row has {name} = {values[0]:g}, so that its part of the loss cannot be told from E: "
                "give runs of several sizes and of several token counts."
            )


def _flops_law(runs: Runs) -> FlopsLaw:
    if runs.columns.flops == SIX_ND:
        return FlopsLaw(6.0, 1.0)
    log_ratio = np.log(runs.flops) - np.log(runs.params) - np.log(runs.tokens)
    middle = float(np.median(log_ratio))
    off = float(np.abs(log_ratio - middle).max())
    if off < 0.01:
        return FlopsLaw(math.exp(middle), 1.0, off)
    slope, level = np.polyfit(np.log(runs.params), log_ratio, 1)
    scatter = float(np.abs(log_ratio - level - slope * np.log(runs.params)).max())
    return FlopsLaw(math.exp(level), 1.0 + float(slope), scatter)


def _profile(fit: Estimate, power: float) -> dict[str, Interval]:
    if fit.freedom < 1:
        return _named(np.array([[0.0, np.inf]] * 6), power)
    chosen = [0, 3, 4]
    covariance = fit.covariance[np.ix_(chosen, chosen)]
    deviate = critical_value(correlation(covariance), fit.freedom, LEVEL)
    law = fit.law
    log_a = _natural(law, lambda t: (t[:, 1], np.eye(5)[1] + 0 * t))
    log_b = _natural(law, lambda t: (t[:, 2], np.eye(5)[2] + 0 * t))
    quantities = [pick(0), log_a, log_b, pick(3), pick(4), _size_exponent(power)]
    ends = profile(fit, quantities, [deviate] * len(quantities))
    with np.errstate(over="ignore"):
        ends[1:3] = np.exp(ends[1:3])
    return _named(np.maximum(ends, 0.0), power)


def _bootstrap(fit: Estimate, power: float, samples: int, seed: int) -> dict[str, Interval]:
    if fit.freedom < 1:
        return _named(np.array([[0.0, np.inf]] * 6), power)
    rows, random = len(fit.law.x), np.random.default_rng(seed)
    share = max(1, _BOOTSTRAP_CELLS // rows)  # samples that fit into memory at once
    parts = []
    for start in range(0, samples, share):
        size = min(share, samples - start)
        weights = random.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)
        parts.append(minimise(fit.law, np.tile(fit.theta, (size, 1)), weights=weights, iterations=100))
    found = np.concatenate(parts)
    natural = fit.law.natural(found)
    values = np.column_stack([natural, natural[:, 4] / (natural[:, 3] + power * natural[:, 4])])
    ends = np.quantile(values, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=0).T
    rounding = NOISE_FLOOR * np.abs(ends)  # a table without noise gives the same fit every time
    return _named(np.stack([ends[:, 0] - rounding[:, 0], ends[:, 1] + rounding[:, 1]], -1), power)


def _named(ends: Array, power: float) -> dict[str, Interval]:
    intervals = {name: (float(low), float(high)) for name, (low, high) in zip((*COEFFICIENTS, "a"), ends, strict=True)}
    low, high = intervals["a"]
    return intervals | {"b": (1 - power * high, 1 - power * low)}


def _warnings(fit: ParametricFit) -> list[str]:
    runs, messages = fit.runs, []
    if fit.estimate.freedom < 1:
        messages.append(
            f"{len(runs)} rows for 5 coefficients leave nothing to judge the fit by: there are no intervals."
        )
    else:
        messages.extend(_weakness(fit))
    if fit.flops_law.scatter > 0.1:
        messages.append(
            f"column {runs.columns.flops} is up to {fit.flops_law.scatter:.0%} off "
            f"{fit.flops_law.coefficient:.3g}·N^{fit.flops_law.exponent:.3f}·D, which optima are computed with."
        )
    outside = [c for c in (runs.flops.min(), runs.flops.max()) if _outside(fit, float(c))]
    if outside and fit.A > 0 and fit.B > 0:
        sizes = " and ".join(f"{fit.optimal_params(c):.3g} at {c:.3g} FLOPs" for c in outside)
        messages.append(
            f"the best size by this law lies beyond the sizes tried ({runs.params.min():.3g} to "
            f"{runs.params.max():.3g}): {sizes}. Add runs there."
        )
    return messages


def _outside(fit: ParametricFit, flops: float) -> bool:
    return not fit.runs.params.min() <= fit.optimal_params(flops) <= fit.runs.params.max()


def _weakness(fit: ParametricFit) -> list[str]:
    condition = float(np.linalg.cond(correlation(fit.estimate.covariance)))
    weak = []
    for name in ("alpha", "beta", "E"):
        low, high = fit.intervals[name]
        value = getattr(fit, name)
        if not high - low < 2 * _WEAK_SHARE * value:
            weak.append(f"{name} {number(value)} ({span((low, high))})")
    if weak or not condition < _WEAK_CONDITION:
        about = ", ".join(weak) or "its coefficients trade off against each other"
        return [
            f"weakly identified: {about}; condition number {condition:.2g}. "
            "Runs over a wider range of sizes and of tokens, or with less noise, would pin it down."
        ]
    return []


def _natural(law: Law, function: Functional) -> Functional:
    """A quantity of (E, log A, log B, α, β) as one of (E, a, b, α, β)."""

    def quantity(theta: Array) -> tuple[Array, Array]:
        raw = theta.copy()
        raw[:, 1] += theta[:, 3] * law.mean_params
        raw[:, 2] += theta[:, 4] * law.mean_tokens
        value, gradient = function(raw)
        gradient = np.array(gradient)
        gradient[:, 3] += law.mean_params * gradient[:, 1]
        gradient[:, 4] += law.mean_tokens * gradient[:, 2]
        return value, gradient

    return quantity


def _size_exponent(power: float) -> Functional:
    """The exponent of the best size, a = β / (α + power·β)."""

    def quantity(theta: Array) -> tuple[Array, Array]:
        alpha, beta = theta[:, 3], theta[:, 4]
        gradient = np.zeros_like(theta)
        gradient[:, 3] = -beta / (alpha + power * beta) ** 2
        gradient[:, 4] = alpha / (alpha + power * beta) ** 2
        return beta / (alpha + power * beta), gradient

    return quantity


def _log_size(fit: ParametricFit, flops: float) -> Functional:
    """Log N*(C), the root of αA·N^−α = β·power·B·D^−β."""
    power = fit.flops_law.exponent
    log_product = math.log(flops / fit.flops_law.coefficient)

    def function(theta: Array) -> tuple[Array, Array]:
        _, log_a, log_b, alpha, beta = theta.T
        total = alpha + power * beta
        size = (np.log(alpha) + log_a - np.log(beta * power) - log_b + beta * log_product) / total
        zero = np.zeros_like(alpha)
        by_alpha = (1 / alpha - size) / total
        by_beta = (log_product - 1 / beta - power * size) / total
        return size, np.stack([zero, 1 / total, -1 / total, by_alpha, by_beta], -1)

    return _natural(fit.estimate.law, function)


def _log_loss(fit: ParametricFit, flops: float) -> Functional:
    """Log L*(C); moving N* does not change it to first order."""
    power = fit.flops_law.exponent
    log_product = math.log(flops / fit.flops_law.coefficient)
    log_size: Callable[[Array], tuple[Array, Array]] = _log_size(fit, flops)
    law = fit.estimate.law

    def function(theta: Array) -> tuple[Array, Array]:
        rest, log_a, log_b, alpha, beta = theta.T
        centred = theta.copy()
        centred[:, 1] -= alpha * law.mean_params
        centred[:, 2] -= beta * law.mean_tokens
        size = log_size(centred)[0]
        tokens = log_product - power * size
        by_size, by_tokens = np.exp(log_a - alpha * size), np.exp(log_b - beta * tokens)
        total = rest + by_size + by_tokens
        gradient = [np.ones_like(rest), by_size, by_tokens, -by_size * size, -by_tokens * tokens]
        return np.log(total), np.stack(gradient, -1) / total[:, None]

    return _natural(law, function)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
