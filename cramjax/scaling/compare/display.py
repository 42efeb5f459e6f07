"""What a person sees while a comparison runs: a live table in a terminal, anywhere else a line for each run."""

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cramjax.scaling.compare.comparison import Comparison, Outcome
from cramjax.training.display import plain_line
from cramjax.training.metrics import read_records

_SECONDS = 1.0
"""Between two looks at a run's log."""


class ComparisonDisplay:
    """A context manager, entered when the first run starts and left after the last.

    Args:
        console: where to write; None: nowhere.
    """

    def __init__(self, console: Console | None):
        live = console is not None and console.is_terminal and not console.is_jupyter
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if live else None
        self._table, self._what, self._line, self._next = "", "", "", 0.0
        self._started = time.monotonic()

    def __enter__(self) -> "ComparisonDisplay":
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def message(self, text: str) -> None:
        """Print a sentence, which stays."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def running(self, what: str) -> None:
        """Say which run has begun."""
        self._what, self._line, self._next, self._started = what, "", 0.0, time.monotonic()
        if self._live is None:
            self.message(f"{what} …")
        self._draw()

    def progress(self, path: Path) -> None:
        """Show how far the run in a directory is."""
        now = time.monotonic()
        if self._live is None or now < self._next:
            return
        self._next = now + _SECONDS
        trained = [record for record in read_records(path) if record["kind"] == "train"]
        self._line = plain_line(trained[-1]) if trained else f"{now - self._started:.0f}s"
        self._draw()

    def ended(self, outcome: Outcome | None) -> None:
        """Say what the run that was running came to; None: it was stopped."""
        if self._live is None:
            self.message(f"{self._what}: {outcome or 'stopped'}")

    def results(self, comparison: Comparison) -> None:
        """Show what all runs came to so far."""
        self._table = str(comparison)
        self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(Group(Text(self._table), Text(f"{self._what}  {self._line}", "cyan")), refresh=True)
