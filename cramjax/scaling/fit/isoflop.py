"""IsoFLOP parabolas (approach 2 of Hoffmann et al. 2022): the best size at each budget, and power laws through them.

A parabola of the loss in log N is only an approximation of the law, whose two slopes differ: away from the centre of
its sizes its minimum is pulled. `fit_isoflop` says by how much, taking the parametric law for the truth.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from cramjax.errors import ConfigError
from cramjax.scaling.fit.law import NOISE_FLOOR, Array
from cramjax.scaling.fit.powerlaw import LEVEL
from cramjax.scaling.fit.table import Runs
from cramjax.show.numbers import Interval, ends, finite

SAME_BUDGET = 1.1
"""Runs whose FLOPs differ by less than this factor are of one budget."""
_CENTRED = 1 / 3
_BIASED_SIZE = 0.1
_BIASED_EXPONENT = 0.01


@dataclass(frozen=True, eq=False)
class Budget:
    """A parabola through the runs of one budget.

    Attributes:
        flops: of the budget (geometric mean).
        rows: of the table, by size.
        curve: the parabola's coefficients in log N − `centre`, highest first.
        centre: the middle of the log sizes tried.
        params: the size at the minimum.
        tokens: what that size is trained on at this budget.
        loss: at the minimum.
        offset: where the minimum lies between the smallest (−1) and the largest (1) size tried, in log N.
        at_edge: the minimum lies outside the sizes tried, or the best run is the smallest or the largest.
        used: the power laws go through it.
        bias: by what factor the parabola misplaces the best size if the parametric law is true; None: not known.
    """

    flops: float
    rows: tuple[int, ...]
    curve: Array
    centre: float
    params: float
    tokens: float
    loss: float
    offset: float
    at_edge: bool
    used: bool
    bias: float | None

    def parabola(self, params: Any) -> Any:
        """The parabola's loss at a size (a number or an array)."""
        return np.polyval(self.curve, np.log(params) - self.centre)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ComputeLaws:
    """N* ∝ C^a, D* ∝ C^b, L* ∝ C^c.

    Attributes:
        a: exponent of the best size.
        b: exponent of the best number of tokens.
        c: exponent of the loss reached (negative).
        coefficients: of the three power laws, by `params`, `tokens` and `loss`.
        intervals: 95%, of a, b and c, from a bootstrap.
        warnings: what a reader should know.
        draws: bootstrapped (log coefficient, exponent) of each law [sample, 2].
    """

    a: float
    b: float
    c: float
    coefficients: Mapping[str, float]
    intervals: Mapping[str, Interval]
    warnings: tuple[str, ...]
    draws: Mapping[str, Array]

    def predict(self, name: str, flops: float) -> tuple[float, Interval]:
        """A power law's value at a number of FLOPs, and its 95% interval.

        Args:
            name: `params`, `tokens` or `loss`.
            flops: training FLOPs.
        """
        value = self.coefficients[name] * flops ** {"params": self.a, "tokens": self.b, "loss": self.c}[name]
        draws = self.draws[name]
        low, high = percentiles(draws[:, 0] + draws[:, 1] * math.log(flops), math.log(value))
        return value, (math.exp(low), math.exp(high))


@dataclass(frozen=True, eq=False, repr=False)
class IsoFlopFit(ComputeLaws):
    """Best sizes by budget, and the power laws through them; intervals are of the residuals around the parabolas.

    Attributes:
        budgets: by FLOPs.
        bias: what the parabolas add to `a` if the parametric law is true; None: not known.
    """

    budgets: tuple[Budget, ...]
    bias: float | None

    def json(self) -> dict[str, Any]:
        """Exponents, intervals and minima."""
        fields = ("flops", "params", "tokens", "loss", "offset", "at_edge", "used", "bias")
        return {
            **{name: finite(getattr(self, name)) for name in "abc"},
            "coefficients": dict(self.coefficients),
            "intervals": {name: ends(interval) for name, interval in self.intervals.items()},
            "bias": self.bias,
            "budgets": [{name: _plain(getattr(budget, name)) for name in fields} for budget in self.budgets],
        }


def percentiles(draws: Array, value: float) -> Interval:
    """The 95% interval of bootstrapped values, drawn out to hold the estimate; without draws, everything.

    Args:
        draws: bootstrapped values.
        value: the estimate.
    """
    if len(draws) == 0:
        return -math.inf, math.inf
    low, high = np.quantile(draws, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(min(low, value)), float(max(high, value))


def budgets_of(runs: Runs) -> list[list[int]]:
    """The rows of each budget with at least three sizes, smallest FLOPs and sizes first."""
    order = np.argsort(runs.flops, kind="stable")
    groups: list[list[int]] = []
    for i in order:
        if groups and runs.flops[i] <= SAME_BUDGET * runs.flops[groups[-1][0]]:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    for group in groups:
        group.sort(key=lambda i: runs.params[i])
    return [group for group in groups if len({float(runs.params[i]) for i in group}) >= 3]


def fit_isoflop(
    runs: Runs,
    *,
    truth: Callable[[Any, Any], Any] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> IsoFlopFit:
    """Fit a parabola of the loss in log N to each budget, and power laws through the minima.

    Minima are weighted by how well their parabolas place them, given the scatter around all of them. Minima outside the
    sizes tried are left out of the power laws.

    Args:
        runs: the table.
        truth: the loss of sizes and tokens by the parametric law, to say how far the parabolas are biased.
        samples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ConfigError: fewer than two budgets have three sizes, or a minimum inside them.
    """
    groups = budgets_of(runs)
    if len(groups) < 2:
        raise ConfigError(
            f"IsoFLOP parabolas need at least 2 budgets with 3 sizes or more, and the table has {len(groups)}: give "
            f"runs of several sizes at the same FLOPs (within {SAME_BUDGET - 1:.0%}), or use another method."
        )
    budgets = [_budget(runs, group, truth) for group in groups]
    used = [budget for budget in budgets if budget.used]
    if len(used) < 2:
        raise ConfigError(
            f"only {len(used)} of {len(budgets)} budgets have their lowest loss inside the sizes tried: add runs of "
            "larger and of smaller sizes at each budget."
        )
    noise, freedom = _noise(runs, budgets)
    weights = np.array([1 / _placing_variance(runs, budget, noise) for budget in used])
    laws = _power_laws(used, weights, *_minima(used))
    draws = _bootstrap(runs, used, weights, _widened(noise, freedom), samples, seed)
    exponents = {name: float(laws[law][1]) for name, law in zip("abc", laws, strict=True)}
    named = zip("abc", ("params", "tokens", "loss"), strict=True)
    intervals = {name: percentiles(draws[law][:, 1], exponents[name]) for name, law in named}
    bias = None
    if all(budget.bias is not None for budget in used):
        shifts = np.log([budget.bias or 1.0 for budget in used])
        bias = float(_line(np.log([budget.flops for budget in used]), shifts, weights)[1])
    return IsoFlopFit(
        tuple(budgets),
        **exponents,
        coefficients={name: float(np.exp(law[0])) for name, law in laws.items()},
        intervals=intervals,
        bias=bias,
        warnings=tuple(_warnings(budgets, bias, exponents["a"], freedom)),
        draws=draws,
    )


def _budget(runs: Runs, group: Sequence[int], truth: Callable[[Any, Any], Any] | None) -> Budget:
    size, loss = np.log(runs.params[group]), runs.loss[group]
    centre, half = (size[0] + size[-1]) / 2, (size[-1] - size[0]) / 2
    curve = np.polyfit(size - centre, loss, 2)
    lowest = -curve[1] / (2 * curve[0]) if curve[0] > 0 else (-np.inf if loss[0] < loss[-1] else np.inf)
    offset = float(lowest / half)
    inside = bool(abs(offset) < 1)
    at_edge = not inside or int(np.argmin(loss)) in (0, len(group) - 1)
    place = centre + np.clip(lowest, -half, half)
    log_flops = float(np.log(runs.flops[group]).mean())
    slope, level = np.polyfit(size - centre, np.log(runs.tokens[group]), 1)
    bias = _bias(truth, size, centre, (slope, level)) if truth is not None and inside else None
    tokens = math.exp(level + slope * (place - centre))
    bottom = float(np.polyval(curve, place - centre))
    at = (math.exp(place), tokens, bottom)
    return Budget(math.exp(log_flops), tuple(group), curve, centre, *at, offset, at_edge, inside, bias)


def _bias(truth: Callable[[Any, Any], Any], size: Array, centre: float, line: tuple[float, float]) -> float | None:
    """The factor between the minimum of a parabola through the true losses and the true minimum at that budget."""

    def loss(at: Array) -> Array:
        return truth(np.exp(at), np.exp(line[1] + line[0] * (at - centre)))

    curve = np.polyfit(size - centre, loss(size), 2)
    if not curve[0] > 0:
        return None
    width = size[-1] - size[0]
    grid = np.linspace(size[0] - width, size[-1] + width, 4001)
    place = int(np.argmin(loss(grid)))
    if place in (0, len(grid) - 1):
        return None
    near = np.linspace(grid[place - 1], grid[place + 1], 2001)
    return math.exp(centre - curve[1] / (2 * curve[0]) - near[int(np.argmin(loss(near)))])


def _minima(budgets: Sequence[Budget]) -> tuple[Array, Array, Array]:
    return (
        np.log([budget.params for budget in budgets]),
        np.log([budget.tokens for budget in budgets]),
        np.log([budget.loss for budget in budgets]),
    )


def _power_laws(
    budgets: Sequence[Budget], weights: Array, params: Array, tokens: Array, loss: Array
) -> dict[str, Array]:
    """(log coefficient, exponent) of each law; from minima [budget] or [sample, budget]."""
    flops = np.log([budget.flops for budget in budgets])
    even = np.ones_like(weights)  # the loss at a minimum does not depend on where exactly the minimum lies
    return {
        "params": _line(flops, params, weights),
        "tokens": _line(flops, tokens, weights),
        "loss": _line(flops, loss, even),
    }


def _line(x: Array, y: Array, weights: Array) -> Array:
    """Intercept and slope of weighted least squares: [..., 2]."""
    share = weights / weights.sum()
    middle = share @ x
    slope = (y @ (share * (x - middle))) / (share @ (x - middle) ** 2)
    return np.stack([y @ share - slope * middle, slope], -1)


def _residuals(runs: Runs, budget: Budget) -> Array:
    rows = list(budget.rows)
    return runs.loss[rows] - budget.parabola(runs.params[rows])


def _noise(runs: Runs, budgets: Sequence[Budget]) -> tuple[float, int]:
    """Scatter of the relative loss around all parabolas together, and its degrees of freedom."""
    freedom = sum(len(budget.rows) - 3 for budget in budgets)
    if freedom < 1:
        return math.nan, 0
    total = sum(float(((_residuals(runs, budget) / budget.loss) ** 2).sum()) for budget in budgets)
    return max(math.sqrt(total / freedom), NOISE_FLOOR), freedom


def _widened(noise: float, freedom: int) -> float:
    """Noise such that normal percentiles of a bootstrap reach as far as t-intervals would."""
    upper = 0.5 + LEVEL / 2
    return noise * float(stats.t.ppf(upper, freedom) / stats.norm.ppf(upper)) if freedom else noise


def _placing_variance(runs: Runs, budget: Budget, noise: float) -> float:
    """The variance of log N* that this scatter means for a parabola's minimum (delta method)."""
    size = np.log(runs.params[list(budget.rows)]) - budget.centre
    design = np.stack([size**2, size, np.ones_like(size)], -1)
    covariance = np.linalg.inv(design.T @ design)
    curve = budget.curve
    gradient = np.array([curve[1] / (2 * curve[0] ** 2), -1 / (2 * curve[0]), 0.0])
    scale = budget.loss * noise if math.isfinite(noise) else budget.loss
    return float(gradient @ covariance @ gradient) * scale**2


def _bootstrap(
    runs: Runs, used: Sequence[Budget], weights: Array, noise: float, samples: int, seed: int
) -> dict[str, Array]:
    """Laws through the minima of parabolas whose losses are drawn anew: fitted plus residuals of all budgets."""
    if not math.isfinite(noise):
        return {name: np.empty((0, 2)) for name in ("params", "tokens", "loss")}
    pool = np.concatenate([_residuals(runs, budget) / budget.loss for budget in used])
    spread = math.sqrt(float((pool**2).mean()))
    pool = (pool - pool.mean()) * (noise / spread) if spread > 0 else np.full(1, 0.0)
    random = np.random.default_rng(seed)
    minima = np.empty((3, samples, len(used)))
    for place, budget in enumerate(used):
        rows = list(budget.rows)
        size = np.log(runs.params[rows]) - budget.centre
        fitted = budget.parabola(runs.params[rows])
        drawn = fitted + budget.loss * random.choice(pool, (samples, len(rows)))
        curves = drawn @ np.linalg.pinv(np.stack([size**2, size, np.ones_like(size)], -1)).T
        with np.errstate(divide="ignore", invalid="ignore"):
            lowest = -curves[:, 1] / (2 * curves[:, 0])
        # A parabola that opens downwards has its minimum at an edge; none is looked for beyond.
        edge = np.where(curves @ [size[0] ** 2, size[0], 1] < curves @ [size[-1] ** 2, size[-1], 1], size[0], size[-1])
        lowest = np.clip(np.where(curves[:, 0] > 0, lowest, edge), size[0], size[-1])
        slope, level = np.polyfit(size, np.log(runs.tokens[rows]), 1)
        minima[0, :, place] = budget.centre + lowest
        minima[1, :, place] = level + slope * lowest
        minima[2, :, place] = np.log((curves * np.stack([lowest**2, lowest, np.ones_like(lowest)], -1)).sum(-1))
    return _power_laws(used, weights, *minima)


def _plain(value: float | None) -> float | None:
    return finite(value) if isinstance(value, float) else value


def _warnings(budgets: Sequence[Budget], bias: float | None, a: float, freedom: int) -> list[str]:
    messages = []
    for budget in budgets:
        if budget.at_edge:
            left_out = "" if budget.used else " It is left out of the power laws."
            larger = budget.offset > 0
            messages.append(
                f"at {budget.flops:.3g} FLOPs the minimum lies at the edge of the sizes tried: "
                f"add {'larger' if larger else 'smaller'} sizes.{left_out}"
            )
    off = [budget for budget in budgets if budget.used and not budget.at_edge and abs(budget.offset) > _CENTRED]
    if off:
        places = ", ".join(f"{budget.offset:+.0%} at {budget.flops:.3g}" for budget in off)
        messages.append(
            "parabolas are biased away from the centre of their sizes, and these minima are off centre (of log N, 0 "
            f"is the middle and 100% the edge): {places} FLOPs. Centre the sizes of each budget on its best one."
        )
    known = [budget for budget in budgets if budget.used and budget.bias is not None]
    worst = max(known, key=lambda budget: abs(math.log(budget.bias or 1.0)), default=None)
    far = worst is not None and abs((worst.bias or 1.0) - 1) > _BIASED_SIZE
    if far or (bias is not None and abs(bias) > _BIASED_EXPONENT):
        wrong = [] if bias is None else [f"the exponent a = {a:.3f} by {bias:+.3f}"]
        if worst is not None:
            wrong.append(f"the best size by up to {(worst.bias or 1.0) - 1:+.0%} (at {worst.flops:.3g} FLOPs)")
        messages.append(f"parabolas misplace {' and '.join(wrong)} if the parametric law is true: trust it more.")
    if freedom < 1:
        messages.append("three sizes at each budget leave nothing to judge the parabolas by: there are no intervals.")
    elif sum(budget.used for budget in budgets) < 3:
        messages.append("only two budgets: a line always passes through two minima, so give more budgets.")
    return messages
