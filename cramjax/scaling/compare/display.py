"""What a person sees while a comparison runs: a live table in a terminal, anywhere else a line for each run."""

import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.text import Text

from cramjax.scaling.compare.comparison import Comparison, Outcome
from cramjax.show.live import Picture
from cramjax.training.display import plain_line
from cramjax.training.metrics import read_records

_SECONDS = 1.0
"""Between two looks at a run's log."""


class ComparisonDisplay(Picture):
    """A context manager, entered when the first run starts and left after the last.

    Args:
        console: where to write; None: nowhere.
    """

    def __init__(self, console: Console | None):
        super().__init__(console, _SECONDS, transient=True)
        self._results: RenderableType = ""
        self._what, self._line = "", ""
        self._started = time.monotonic()

    def running(self, what: str) -> None:
        """Say which run has begun."""
        self._what, self._line, self._next, self._started = what, "", 0.0, time.monotonic()
        if not self.drawn:
            self.message(f"{what} …")
        self._draw()

    def progress(self, path: Path) -> None:
        """Show how far the run in a directory is."""
        if self.due():
            trained = [record for record in read_records(path) if record["kind"] == "train"]
            self._line = plain_line(trained[-1]) if trained else f"{time.monotonic() - self._started:.0f}s"
            self._draw()

    def ended(self, outcome: Outcome | None) -> None:
        """Say what the run that was running came to; None: it was stopped."""
        if not self.drawn:
            self.message(f"{self._what}: {outcome or 'stopped'}")

    def results(self, comparison: Comparison) -> None:
        """Show what all runs came to so far."""
        self._results = comparison
        self._draw()

    def _draw(self) -> None:
        self.draw(Group(self._results, Text(f"{self._what}  {self._line}", "cyan")))
