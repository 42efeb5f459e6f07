"""Figures of a compression, and the page that shows them: one HTML file that needs nothing else."""

from collections.abc import Mapping
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cramjax.compress.report import Compression
from cramjax.compress.show import page
from cramjax.show.figures import BLUE, COLOURS, INK, ORANGE, single, stacked_bars, svg_of

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0 auto; max-width: 1040px; padding: 2rem 1.25rem 4rem; font: 15px/1.55 system-ui, sans-serif; }}
svg {{ width: 100%; height: auto; display: block; }}
figure {{ margin: 1.5rem 0; }}
table {{ border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: 0.3rem; }}
td, th {{ text-align: left; padding: 0.2rem 1.6rem 0.2rem 0; font-weight: 400; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def html(made: Compression) -> str:
    """The report as HTML: figures, and the tables of its view."""
    title = f"{made.out.name}: {made.config['method']}"
    figures = "".join(f"<figure>{_inline(figure)}</figure>" for figure in (errors(made), times(made), sizes(made)))
    return _PAGE.format(title=escape(title), body=figures + page(made).html())


def errors(made: Compression) -> Figure:
    """Error of each kind of matrix, by block."""
    names = dict.fromkeys(matrix.name for matrix in made.matrices)

    def draw(axes: Axes) -> None:
        for name, colour in zip(names, COLOURS * (1 + len(names) // len(COLOURS)), strict=False):
            own = [matrix for matrix in made.matrices if matrix.name == name]
            label = name.removesuffix("/kernel")
            axes.plot([m.block for m in own], [100 * m.error for m in own], color=colour, marker=".", label=label)
        if all(matrix.error > 0 for matrix in made.matrices):
            axes.set_yscale("log")
        axes.set_xlabel("block")
        axes.set_ylabel("% of energy")
        axes.set_title(f"Error of {'outputs' if made.tokens else 'weights'}")
        axes.legend(labelcolor=INK)

    return single((9, 3.4), draw)


def times(made: Compression) -> Figure:
    """Seconds of each kind of matrix, with what its calibration takes."""
    spent: dict[str, float] = {}
    for matrix in made.matrices:
        name = matrix.name.removesuffix("/kernel")
        spent[name] = spent.get(name, 0.0) + matrix.seconds
    return _bars("Time by matrix, its part of the forward pass and its Hessian included", "seconds", {"": spent})


def sizes(made: Compression) -> Figure:
    """Bytes of the parts of the model, before and after."""
    before = {size.part: size.before / 2**20 for size in made.sizes}
    after = {size.part: size.after / 2**20 for size in made.sizes}
    return _bars("Bytes before and after", "MiB", {"before": before, "after": after})


def _bars(title: str, unit: str, bars: Mapping[str, Mapping[str, float]]) -> Figure:
    names = [f"{name} {bar}".strip() for name in next(iter(bars.values())) for bar in bars]
    widths = [own[name] for name in next(iter(bars.values())) for own in bars.values()]

    def draw(axes: Axes) -> None:
        stacked_bars(axes, names, {"": widths}, [ORANGE if len(bars) == 1 else BLUE])
        axes.set_xlabel(unit)
        axes.set_title(title)

    return single((9, 1.0 + 0.3 * len(names)), draw)


def _inline(figure: Figure) -> str:
    """A figure whose ink is the page's, so that it is read on light and on dark paper."""
    return svg_of(figure).replace(INK, "currentColor")
