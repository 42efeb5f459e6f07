"""How figures look, wherever they are drawn: colours, style, and a figure that shows itself in a notebook.

Colours are chosen to be read on light and on dark paper; text, axes and grid take the colour `INK`, which a page may
replace by its own.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK = "#7d8590"
COLOURS = BLUE, ORANGE, GREEN, PURPLE, RED = "#3b8eea", "#e8823a", "#2da66f", "#9a6fe0", "#e05561"

_STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9,
    "font.family": "sans-serif",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cramjax",
}


@dataclass(frozen=True)
class Plot:
    """A figure that shows itself in a notebook."""

    figure: Figure

    def _repr_svg_(self) -> str:
        return svg_of(self.figure)

    def save(self, path: str | Path) -> None:
        """Write the figure to a file whose ending says the format (`.svg`, `.png`, `.pdf`)."""
        with styled():
            self.figure.savefig(path, dpi=160)


def svg_of(figure: Figure) -> str:
    """A figure as an `<svg>` element, the same bytes every time."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def styled() -> AbstractContextManager[None]:
    """Matplotlib's settings for these figures, while drawing and while saving."""
    return mpl.rc_context(_STYLE)


def single(size: tuple[float, float], draw: Callable[[Axes], None]) -> Figure:
    """A figure of one panel.

    Args:
        size: width and height in inches.
        draw: draws on the panel's axes.
    """
    with styled():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
    return figure


def stacked_bars(
    axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]], colours: Sequence[str]
) -> float:
    """Draw horizontal bars, each of parts one after the other, the first bar at the top.

    Args:
        axes: where.
        names: of the bars.
        parts: the lengths of a part in all bars, by the part's name.
        colours: of the parts.

    Returns:
        How long the longest bar is.
    """
    left = [0.0] * len(names)
    for (part, widths), colour in zip(parts.items(), colours, strict=False):
        axes.barh(names, widths, left=left, color=colour, height=0.62, label=part)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return max(left)


def memory_bars(title: str, bars: Mapping[str, Mapping[str, float]], limit: float) -> Figure:
    """Horizontal bars of bytes, each cut into kinds, and a line at what there is.

    Args:
        title: of the figure.
        bars: bytes of each kind by name of the bar; every bar has the same kinds.
        limit: bytes there are.
    """
    names = list(bars)
    parts = {kind: [bars[name][kind] / 2**30 for name in names] for kind in next(iter(bars.values()))}

    def draw(axes: Axes) -> None:
        longest = stacked_bars(axes, names, parts, (*COLOURS, INK))
        axes.axvline(limit / 2**30, color=INK, linewidth=1, linestyle="--")
        axes.set_xlim(0, 1.08 * max(longest, limit / 2**30))
        axes.set_xlabel("GiB")
        axes.set_title(title)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0, labelcolor=INK)

    return single((9, 1.2 + 0.42 * len(bars)), draw)


def budget_axis(axes: Axes) -> None:
    """Make the horizontal axis the share of the budget that is spent."""
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    axes.set_xlabel("budget spent")
