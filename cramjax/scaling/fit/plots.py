"""Figures of fits: IsoFLOP curves, the best size, tokens and loss by compute, the law's surface, its residuals."""

from collections.abc import Callable, Iterable
from itertools import cycle

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cramjax.scaling.fit.isoflop import budgets_of
from cramjax.scaling.fit.law import Array
from cramjax.scaling.fit.powerlaw import PowerLaws
from cramjax.scaling.fit.scaling_fit import ScalingFit
from cramjax.show.figures import BLUE, COLOURS, GREEN, INK, ORANGE, Plot, styled

_BEYOND = 10.0
"""How far beyond the largest budget the laws are drawn."""


def overview(fit: ScalingFit) -> Plot:
    """All that a fit has to show, one panel each."""
    panels: list[Callable[[Axes, ScalingFit], None]] = [draw_isoflop, draw_params, draw_tokens, draw_loss]
    if fit.parametric is not None:
        panels += [draw_surface, draw_residuals]
    with styled():
        columns = 3 if len(panels) > 4 else 2
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.8 * columns, 3.1 * rows), layout="constrained")
        for axes, draw in zip(np.ravel(figure.subplots(rows, columns)), panels, strict=True):
            draw(axes, fit)
    return Plot(figure)


def power_laws(fit: PowerLaws) -> Plot:
    """Points and laws of each group, on logarithmic axes."""
    with styled():
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        markers = cycle("os^DvP")
        for (key, law), colour in zip(fit.laws.items(), cycle(COLOURS), strict=False):
            name = ", ".join(map(str, key)) or fit.y
            x = np.geomspace(law.x.min(), law.x.max(), 2)
            axes.plot(x, [law.predict(at)[0] for at in x], color=colour, linewidth=1)
            label = f"{name}: {law.exponent:.3f}"
            axes.errorbar(
                law.x,
                law.y,
                yerr=None if law.std is None else law.y * (np.exp([-law.std, law.std]) - 1) * [[-1], [1]],
                fmt=next(markers),
                color=colour,
                markersize=3.5,
                elinewidth=0.8,
                label=label,
            )
        _logarithmic(axes, f"{fit.y} = c·{fit.x}^p", fit.x, fit.y)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), labelcolor=INK)
    return Plot(figure)


def draw_isoflop(axes: Axes, fit: ScalingFit) -> None:
    """Loss by size, a curve for each budget: runs, parabolas (solid) and the parametric law (dashed)."""
    runs, shared = fit.runs, budgets_of(fit.runs)
    for rows, colour in zip(shared, _shades(len(shared)), strict=True):
        axes.plot(runs.params[rows], runs.loss[rows], "o", color=colour, markersize=3)
        sizes = np.geomspace(runs.params[rows].min(), runs.params[rows].max(), 60)
        flops = float(np.exp(np.log(runs.flops[rows]).mean()))
        if fit.parametric is not None:
            law = fit.parametric
            axes.plot(sizes, law.loss(sizes, law.tokens_for(sizes, flops)), "--", color=colour, linewidth=1)
        for budget in fit.isoflop.budgets if fit.isoflop is not None else ():
            if budget.rows == tuple(rows):
                axes.plot(sizes, budget.parabola(sizes), color=colour, linewidth=1.2)
                if budget.used:
                    axes.plot([budget.params], [budget.loss], "D", color=colour, markersize=5, markeredgecolor=INK)
    if not shared:
        axes.scatter(runs.params, runs.loss, c=np.log(runs.flops), cmap="viridis", s=9)
    axes.set_xscale("log")
    axes.set_xlabel(f"N ({runs.columns.params})")
    axes.set_title("Loss at each budget" if shared else "Loss by size")


def draw_params(axes: Axes, fit: ScalingFit) -> None:
    """The best size by compute."""
    _draw_law(axes, fit, "params", "Best size N*(C)")
    axes.set_ylabel(fit.runs.columns.params)


def draw_tokens(axes: Axes, fit: ScalingFit) -> None:
    """The best number of tokens by compute."""
    _draw_law(axes, fit, "tokens", "Best tokens D*(C)")
    axes.set_ylabel(fit.runs.columns.tokens)


def draw_loss(axes: Axes, fit: ScalingFit) -> None:
    """The loss at the best size by compute, and all runs."""
    axes.plot(fit.runs.flops, fit.runs.loss, ".", color=INK, markersize=3, alpha=0.6)
    _draw_law(axes, fit, "loss", "Loss of the best L*(C)")
    axes.set_yscale("linear")
    axes.set_ylabel(fit.runs.columns.loss)


def draw_surface(axes: Axes, fit: ScalingFit) -> None:
    """The parametric law over size and tokens, the runs, and the best size for each compute."""
    law, runs = fit.parametric, fit.runs
    assert law is not None
    params = np.geomspace(runs.params.min() / 2, runs.params.max() * 2, 80)
    tokens = np.geomspace(runs.tokens.min() / 2, runs.tokens.max() * 2, 80)
    loss = law.loss(*np.meshgrid(params, tokens))
    levels = np.linspace(loss.min(), float(np.quantile(loss, 0.97)), 13)
    contours = axes.contour(params, tokens, loss, levels=levels, cmap="viridis", linewidths=1)
    axes.clabel(contours, levels[1:-1:3], fmt="%.2f", fontsize=7)
    axes.plot(runs.params, runs.tokens, "o", color=INK, markersize=2.5)
    best = law.optimal_params(_compute(fit))
    axes.plot(best, law.tokens_for(best, _compute(fit)), color=ORANGE)
    axes.set_xlim(params[0], params[-1])
    axes.set_ylim(tokens[0], tokens[-1])
    _logarithmic(axes, "The law, and its best path", runs.columns.params, runs.columns.tokens)


def draw_residuals(axes: Axes, fit: ScalingFit) -> None:
    """What the runs' losses exceed the parametric law by, by compute; shades are sizes."""
    law, runs = fit.parametric, fit.runs
    assert law is not None
    size = np.log(runs.params)
    axes.axhline(0, color=INK, linewidth=1)
    axes.scatter(runs.flops, 100 * law.residuals, c=size - size.min(), cmap="viridis", s=10)
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs")
    axes.set_ylabel("% of the loss (lighter: larger N)")
    axes.set_title("Residuals")


def _draw_law(axes: Axes, fit: ScalingFit, name: str, title: str) -> None:
    compute = _compute(fit)
    if fit.parametric is not None:
        best = [fit.parametric.optimum(float(at)) for at in compute]
        values = [getattr(at, name) for at in best]
        axes.plot(compute, values, color=BLUE, label="parametric")
        _band(axes, compute, [at.intervals[name] for at in best], values, BLUE)
    for other, colour, label in ((fit.isoflop, ORANGE, "IsoFLOP"), (fit.envelope, GREEN, "envelope")):
        if other is not None:
            found = [other.predict(name, float(at)) for at in compute]
            values = [value for value, _ in found]
            axes.plot(compute, values, color=colour, linewidth=1.2, label=label)
            _band(axes, compute, [interval for _, interval in found], values, colour)
    if fit.isoflop is not None:
        used = [budget for budget in fit.isoflop.budgets if budget.used]
        axes.plot([at.flops for at in used], [getattr(at, name) for at in used], "D", color=ORANGE, markersize=4)
    if fit.envelope is not None:
        axes.plot(fit.envelope.flops, getattr(fit.envelope, name), ".", color=GREEN, markersize=2)
    axes.axvline(fit.runs.flops.max(), color=INK, linewidth=0.8, linestyle=":")
    _logarithmic(axes, title, "FLOPs", "")
    axes.legend(fontsize=7, labelcolor=INK)


def _band(axes: Axes, x: Array, intervals: Iterable[tuple[float, float]], values: Iterable[float], colour: str) -> None:
    """Shade intervals; where an end is unbounded, at most three decades."""
    ends = [
        (max(low, value / 1e3), min(high, value * 1e3)) for (low, high), value in zip(intervals, values, strict=True)
    ]
    axes.fill_between(x, [low for low, _ in ends], [high for _, high in ends], color=colour, alpha=0.15, linewidth=0)


def _compute(fit: ScalingFit) -> Array:
    return np.geomspace(fit.runs.flops.min(), fit.runs.flops.max() * _BEYOND, 13)


def _shades(count: int) -> Array:
    return mpl.colormaps["viridis"](np.linspace(0.1, 0.9, max(count, 1)))[:count]


def _logarithmic(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
