"""What a person sees of a sweep: a live table in a terminal, a line for each trial that ends anywhere else."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cramjax.scaling.sweep.results import Row, progress
from cramjax.show.live import Picture, Sentences, suited
from cramjax.show.numbers import format_count, format_seconds

_STYLES = {"done": "green", "failed": "red", "running": "cyan", "stopped": "yellow", "waiting": "dim"}


def make_display(out: Path, console: Console | None = None, *, quiet: bool = False) -> "QuietDisplay | LiveDisplay":
    """The display that suits where output goes.

    Args:
        out: the sweep's directory, where running trials say how far they are.
        console: where to write; default: standard error.
        quiet: show nothing.
    """
    return QuietDisplay() if quiet else suited(console, partial(LiveDisplay, out), PlainDisplay)


class QuietDisplay(Sentences):
    """Shows nothing."""

    def show(self, rows: Sequence[Row], running: Sequence[str]) -> None:
        """Show nothing."""

    def ended(self, row: Row) -> None:
        """Show nothing."""


class PlainDisplay(QuietDisplay):
    """A line for each trial that ends."""

    def ended(self, row: Row) -> None:
        """Print what came of it."""
        self.message(plain_line(row))


class LiveDisplay(Picture):
    """A table that is redrawn in place, twice a second at most."""

    def __init__(self, out: Path, console: Console, now: Callable[[], float] = time.monotonic):
        super().__init__(console, 0.5, now=now)
        self._out, self._terminal = out, console

    def show(self, rows: Sequence[Row], running: Sequence[str]) -> None:
        """Redraw the table."""
        if self.due() or not running:
            newest = {name: progress(self._out, name) for name in running}
            self.draw(render(rows, newest, height=max(4, self._terminal.height - 6)))

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
        bits, accuracy = row["bits_per_byte"], row["accuracy"]  # labels and pairs have no bits, numbers no accuracy
        score = f"loss {row['loss']:.4f}" if bits is None else f"{bits:.4f} bits per byte"
        score += f", accuracy {accuracy:.1%}" if bits is None and accuracy is not None else ""
        return (
            f"{row['name']}: {score}, {format_count(row['params'])} parameters, "
            f"{format_count(row['tokens'])} tokens, {format_seconds(row['seconds'])}"
        )
    return f"{row['name']}: {row['status']}{': ' + row['error'] if row['error'] else ''}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
