"""A coordinate check for the eye: a row, and a panel, for each activation."""

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from cramjax.scaling.coordinates import CoordinateCheck
from cramjax.show.numbers import number
from cramjax.show.tables import Grid, Page

if TYPE_CHECKING:
    from cramjax.show.figures import Plot


def table(check: CoordinateCheck) -> Page:
    """Mean change at each width after the last step, and its slope."""
    rows = [
        [name, *(number(float(x)) for x in check.changes[:, -1, place]), f"{check.slopes[name]:+.3f}"]
        for place, name in enumerate(check.names)
    ]
    title = f"mean |x − x₀| after {check.changes.shape[1] - 1} steps"
    return Page([Grid(title, ["width", *map(str, check.widths), "slope"], rows, plain=True)])


def changes_by_width(check: CoordinateCheck) -> "Plot":
    """Mean change by width, a panel for each activation and a line for each step."""
    from matplotlib.figure import Figure  # here, because matplotlib is slow to import
    from matplotlib.ticker import NullLocator

    from cramjax.show.figures import COLOURS, Plot, styled

    with styled():
        figure = Figure(figsize=(2.6 * len(check.names), 2.8), layout="constrained")
        panels = np.ravel(figure.subplots(1, len(check.names), sharey=True))
        for place, (axes, name) in enumerate(zip(panels, check.names, strict=True)):
            for step, colour in zip(range(1, check.changes.shape[1]), cycle(COLOURS)):
                label = f"{step} step" + "s" * (step > 1)
                axes.plot(check.widths, check.changes[:, step, place], "o-", color=colour, markersize=3, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(check.widths, [str(width) for width in check.widths])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{name}: {check.slopes[name]:+.2f}")
            axes.set_xlabel("width")
        panels[0].set_ylabel("mean |x − x₀|")
        panels[0].legend(fontsize=7)
    return Plot(figure)
