"""Figures of a comparison: the difference of each seed with the mean's interval, and mean curves over the budget."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cramjax.scaling.compare.comparison import Comparison, Side
from cramjax.show.figures import BLUE, INK, ORANGE, Plot, budget_axis, styled
from cramjax.training.metrics import read_records
from cramjax.training.plots import column

_POINTS = 101
"""On a mean curve."""


def overview(comparison: Comparison) -> Plot:
    """Differences at the left, curves at the right."""
    with styled():
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
        draw_differences(left, comparison)
        draw_curves(right, comparison)
    return Plot(figure)


def draw_differences(axes: Axes, comparison: Comparison) -> None:
    """B − A of each seed, their mean and its 95% interval; of bits per byte and errors, B is better below 0."""
    counted = [(pair.seed, pair.difference) for pair in comparison.pairs if pair.difference is not None]
    axes.plot([seed for seed, _ in counted], [d for _, d in counted], "o", color=BLUE, label="a seed")
    axes.axhline(0, color=INK, linewidth=1)
    found = comparison.difference
    if found is not None:
        axes.axhline(found.mean, color=ORANGE, label="mean")
        if found.interval is not None:
            axes.axhspan(*found.interval, color=ORANGE, alpha=0.2, linewidth=0, label="95% interval")
        axes.legend(fontsize=7, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("seed")
    axes.set_title(f"B − A, {comparison.measure.words}")


def draw_curves(axes: Axes, comparison: Comparison) -> None:
    """Held-out scores over the spent fraction, the mean of each side's runs of the pairs that count."""
    worst: list[float] = []
    more = comparison.measure.more_is_better
    sides: tuple[tuple[Side, str, str], ...] = (("a", "A", BLUE), ("b", "B", ORANGE))
    for side, name, colour in sides:
        fractions, means = mean_curve(comparison, side)
        if len(means):
            axes.plot(fractions, means, color=colour, label=name)
            worst.append(float(np.interp(0.25, fractions, means)))
    if worst:  # the first quarter is far from everything else and would flatten it
        bottom, top = axes.get_ylim()
        near = min(worst) if more else max(worst)
        if more and near < top:
            axes.set_ylim(near - 0.05 * (top - near), top)
        elif not more and near > bottom:
            axes.set_ylim(bottom, near + 0.05 * (near - bottom))
        axes.legend(labelcolor=INK, loc="lower right" if more else "upper right")
    budget_axis(axes)
    axes.set_title(f"Held-out {comparison.measure.words}, mean")


def mean_curve(comparison: Comparison, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Spent fractions, and the mean of one side's held-out scores there, each run's interpolated linearly."""
    curves = []
    for pair in comparison.pairs:
        if pair.difference is not None:
            records = read_records(comparison.path / f"seed-{pair.seed}" / side)
            x, y = column(records, "evaluate", comparison.measure.name)
            if x:
                curves.append((x, y))
    if not curves:
        return np.empty(0), np.empty(0)
    grid = np.linspace(max(x[0] for x, _ in curves), 1.0, _POINTS)
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
