"""Pages of tables and sentences: in a terminal of any width, as text for a file, as HTML for a notebook.

A table that is wider than its terminal becomes a list: what a row is called, and below it each figure with its name.
"""

import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 100_000
"""Characters in a line that holds any table."""
_CSS = {"bold": "font-weight:bold", "dim": "opacity:0.6", "bold red": "font-weight:bold;color:#e05561"}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        cells: a text for each column.
        style: of all of them, in rich's words; "" for none.
    """

    cells: Sequence[str]
    style: str = ""


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: above it; "" for none.
        columns: their names.
        rows: what is in it; plain sequences of texts have no style.
        left: names of the columns of words; the first one is too. Others are numbers.
        headings: how many columns, from the first, say what a row is about; empty ones are as above.
        plain: no line below the names.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row | Sequence[str]]
    left: Sequence[str] = ()
    headings: int = 1
    plain: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self.table()
        if table.__rich_measure__(console, options.update(max_width=_UNBOUNDED)).maximum <= options.max_width:
            yield table
        else:
            yield from self._list()

    def styled_rows(self) -> list[Row]:
        """The rows, each with its style."""
        return [row if isinstance(row, Row) else Row(row) for row in self.rows]

    def table(self) -> Table:
        """The table at its own width, whatever the terminal's."""
        table = Table(
            title=self.title or None,
            title_justify="left",
            title_style="bold",
            box=None if self.plain else SIMPLE_HEAD,
            padding=(0, 1) if self.plain else (0, 1, 0, 0),
            pad_edge=False,
        )
        for place, name in enumerate(self.columns):
            words = place == 0 or name in self.left
            table.add_column(Text(name), justify="left" if words else "right", no_wrap=True)
        for row in self.styled_rows():
            table.add_row(*map(Text, row.cells), style=row.style or None)
        return table

    def _list(self) -> Iterator[Text | Padding]:
        if self.title:
            yield Text(self.title, "bold")
        for row in self.styled_rows():
            if heading := "  ".join(filter(None, row.cells[: self.headings])):
                yield Text(heading, row.style or "cyan")
            # A figure and its name stay on one line: their spaces do not break.
            named = zip(self.columns[self.headings :], row.cells[self.headings :], strict=True)
            figures = [f"{name} {cell}".strip().replace(" ", "\N{NO-BREAK SPACE}") for name, cell in named if cell]
            if figures:
                yield Padding(Text(", ".join(figures), row.style), (0, 0, 0, 2))


@dataclass(frozen=True)
class Page:
    """A view: tables and sentences, one below the other.

    Attributes:
        parts: what stands on it.
        width: that sentences are wrapped at where there is no terminal, in characters; None: each is one line.
    """

    parts: Sequence[Grid | Text | str]
    width: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in self.parts:
            yield Text(part) if isinstance(part, str) else part

    def text(self) -> str:
        """Plain text: tables as wide as they need to be, sentences wrapped or a line each."""
        buffer = io.StringIO()
        # Told that this is no notebook: there it would show itself, and leave the buffer empty.
        console = Console(file=buffer, width=_UNBOUNDED, color_system=None, force_jupyter=False)
        for part in self.parts:
            console.width = _UNBOUNDED if self.width is None or isinstance(part, Grid) else self.width
            console.print(part, markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip()

    def html(self) -> str:
        """HTML: tables, and a paragraph for each sentence."""
        return "".join(_table_html(part) if isinstance(part, Grid) else _line_html(part) for part in self.parts)


def warning(text: str) -> Text:
    """A sentence that a reader should know."""
    return Text.assemble(("warning:", "bold"), f" {text}")


def figures_html(caption: str, figures: Sequence[tuple[str, str]]) -> str:
    """Names and values below each other as an HTML table."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in figures)
    return f"<table><caption>{html.escape(caption)}</caption>{rows}</table>"


def _table_html(grid: Grid) -> str:
    def cells(tag: str, row: Row) -> str:
        css = f' style="{_CSS[row.style]}"' if row.style in _CSS else ""
        return f"<tr{css}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row.cells) + "</tr>"

    caption = f"<caption>{html.escape(grid.title)}</caption>" if grid.title else ""
    body = "".join(cells("td", row) for row in grid.styled_rows())
    return f"<table>{caption}{cells('th', Row(grid.columns))}{body}</table>"


def _line_html(line: Text | str) -> str:
    if isinstance(line, str):
        return f"<p>{html.escape(line)}</p>" if line else ""
    bold = max((part.end for part in line.spans if part.style == "bold"), default=0)
    bold = len(line.plain) if str(line.style).startswith("bold") else bold
    first, rest = html.escape(line.plain[:bold]), html.escape(line.plain[bold:])
    return f"<p>{f'<b>{first}</b>' if first else ''}{rest}</p>"
