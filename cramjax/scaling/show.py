"""How results print: one table of estimates and intervals, then their warnings, for a terminal and for a notebook."""

import html
import io
import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

Interval = tuple[float, float]
Rows = Sequence[Sequence[str]]


def number(value: float, interval: Interval | None = None) -> str:
    """A value with as many digits as its interval leaves it: at least three, at most seven."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞" if value < 0 else "?"
    digits = 4
    if interval is not None and value:
        width = abs(interval[1] - interval[0])
        if math.isfinite(width) and width > 0:
            digits = min(max(3, 2 + math.ceil(math.log10(abs(value) / width))), 7)
    return f"{value:.{digits}g}"


def span(interval: Interval) -> str:
    """An interval as `low … high`."""
    return f"{number(interval[0], interval)} … {number(interval[1], interval)}"


def as_text(title: str, header: Sequence[str], rows: Rows, warnings: Sequence[str] = (), width: int = 118) -> str:
    """A table and warnings as text, as wide as it needs to be."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(  # which in a notebook would show itself there, and leave the file empty
        file=io.StringIO(), width=max(width, 80), color_system=None, markup=False, highlight=False, force_jupyter=False
    )
    console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    return "\n".join(line.rstrip() for line in text.splitlines())


def as_html(title: str, header: Sequence[str], rows: Rows, warnings: Sequence[str] = ()) -> str:
    """The same as HTML."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    notes = "".join(f"<p><b>warning:</b> {html.escape(warning)}</p>" for warning in warnings)
    return f"<table><caption>{html.escape(title)}</caption>{cells('th', header)}{body}</table>{notes}"


def finite(value: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return float(value) if math.isfinite(value) else None


def ends(interval: Interval) -> list[float | None]:
    """An interval for JSON; null: no bound on that side."""
    return [finite(interval[0]), finite(interval[1])]
