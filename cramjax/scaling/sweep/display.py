"""What a person sees of a sweep: a live table in a terminal, a line for each trial that ends anywhere else."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cramjax.scaling.sweep.results import Row, progress
from cramjax.training.display import format_count, format_seconds

_STYLES = {"done": "green", "failed": "red", "running": "cyan", "stopped": "yellow", "waiting": "dim"}


def make_display(
    out: Path, console: Console | None = None, *, quiet: bool = False
) -> "AbstractContextManager[QuietDisplay]":
    """The display that suits where output goes.

    Args:
        out: the sweep's directory, where running trials say how far they are.
        console: where to write; default: standard error.
        quiet: show nothing.
    """
    if quiet:
        return QuietDisplay()
    console = console or Console(stderr=True)
    return LiveDisplay(out, console) if console.is_terminal and not console.is_jupyter else PlainDisplay(console)


class QuietDisplay:
    """Shows nothing."""

    def __enter__(self) -> "QuietDisplay":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def show(self, rows: Sequence[Row], running: Sequence[str]) -> None:
        """Show nothing."""

    def ended(self, row: Row) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""


class PlainDisplay(QuietDisplay):
    """A line for each trial that ends."""

    def __init__(self, console: Console):
        self._console = console

    def ended(self, row: Row) -> None:
        """Print what came of it."""
        self.message(plain_line(row))

    def message(self, text: str) -> None:
        """Print the sentence on a line of its own."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay(PlainDisplay):
    """A table that is redrawn in place, twice a second at most."""

    def __init__(self, out: Path, console: Console, now: Callable[[], float] = time.monotonic):
        super().__init__(console)
        self._out, self._now, self._next = out, now, 0.0
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> "LiveDisplay":
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(None, None, None)

    def show(self, rows: Sequence[Row], running: Sequence[str]) -> None:
        """Redraw the table."""
        if running and self._now() < self._next:
            return
        self._next = self._now() + 0.5
        newest = {name: progress(self._out, name) for name in running}
        height = max(4, self._console.height - 6)
        self._live.update(render(rows, newest, height), refresh=True)

    def ended(self, row: Row) -> None:
        """Print why, if it failed; the table has the rest."""
        if row["status"] == "failed":
            self.message(plain_line(row))


def render(rows: Sequence[Row], running: Mapping[str, Mapping[str, Any]], height: int) -> RenderableType:
    """The live table: the trials that run and those around them, and how many are in which state.

    Args:
        rows: of all trials.
        running: the newest metrics of those that run, by name.
        height: most trials shown.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("trial", "state", "params", "spent", "loss", "bits/byte", "time"):
        table.add_column(name, justify="left" if name in ("trial", "state") else "right", no_wrap=True)
    first = next((i for i, row in enumerate(rows) if row["name"] in running), len(rows))
    start = max(0, min(first - height // 2, len(rows) - height))
    for row in rows[start : start + height]:
        live = running.get(row["name"])
        state = row["status"] if live is None else "running"
        spent = 1.0 if row["status"] == "done" else float((live or {}).get("fraction", 0.0))
        seen = {"seconds": row["seconds"], "loss": row["loss"], "bits_per_byte": row["bits_per_byte"], **(live or {})}
        table.add_row(
            row["name"],
            Text(state, style=_STYLES[state]),
            format_count(row["params"]),
            f"{spent:.0%}" if spent else "",
            _figure(seen["loss"]),
            _figure(seen["bits_per_byte"]),
            "" if seen["seconds"] is None else format_seconds(seen["seconds"]),
        )
    states = ["running" if row["name"] in running else row["status"] for row in rows]
    counts = "  ".join(f"{states.count(state)} {state}" for state in _STYLES if state in states)
    return Group(table, Text(f"{len(rows)} trials: {counts}", style="bold"))


def plain_line(row: Row) -> str:
    """What came of a trial, in a line."""
    if row["status"] == "done":
        return (
            f"{row['name']}: {row['bits_per_byte']:.4f} bits per byte, {format_count(row['params'])} parameters, "
            f"{format_count(row['tokens'])} tokens, {format_seconds(row['seconds'])}"
        )
    return f"{row['name']}: {row['status']}{': ' + row['error'] if row['error'] else ''}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
