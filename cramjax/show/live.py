"""What a person watches: sentences that stay, a picture that is redrawn in place, a bar of progress."""

import time
from collections.abc import Callable
from typing import Self, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Shown = TypeVar("Shown")


def is_live(console: Console) -> bool:
    """Whether what is drawn there can be drawn again in its place."""
    return console.is_terminal and not console.is_jupyter


def suited(console: Console | None, live: Callable[[Console], Shown], plain: Callable[[Console], Shown]) -> Shown:
    """The display that suits where output goes: live in a terminal, plain lines in a file, a pipe or a notebook.

    Args:
        console: where to write; default: standard error, so that standard output stays for results.
        live: makes the display of a terminal.
        plain: makes that of anything else.
    """
    console = console or Console(stderr=True)
    return live(console) if is_live(console) else plain(console)


class Sentences:
    """A context manager that prints sentences, each on a line of its own.

    Args:
        console: where; None: nowhere.
    """

    def __init__(self, console: Console | None = None):
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def message(self, text: str) -> None:
        """Print the sentence, which stays."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Picture(Sentences):
    """A context manager that draws one picture in place, below the sentences, at most once in a period.

    Args:
        console: where; None: nowhere. The picture is drawn in a terminal only, where it can be drawn again.
        period: seconds between two drawings.
        transient: take the picture away at the end.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        console: Console | None,
        period: float,
        *,
        transient: bool = False,
        now: Callable[[], float] = time.monotonic,
    ):
        super().__init__(console)
        drawn = console is not None and is_live(console)
        self._live = Live(console=console, auto_refresh=False, transient=transient) if drawn else None
        self._period, self._now, self._next = period, now, 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    @property
    def drawn(self) -> bool:
        """Whether there is a picture, and not the sentences alone."""
        return self._live is not None

    def due(self) -> bool:
        """Whether a period has passed since this was last true."""
        now = self._now()
        if self._live is None or now < self._next:
            return False
        self._next = now + self._period
        return True

    def draw(self, picture: RenderableType) -> None:
        """Draw the picture in the place of the last."""
        if self._live is not None:
            self._live.update(picture, refresh=True)


class ProgressDisplay:
    """A context manager; called with what is being done, it shows that: as a bar in a terminal, else once as a line.

    Args:
        console: where to draw; None: nowhere.
    """

    def __init__(self, console: Console | None):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._console, self._what = console, ""
        drawn = console is not None and console.is_terminal
        self._progress = Progress(*columns, console=console, transient=True, disable=not drawn)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say what is being done, and how much of it is."""
        self._progress.update(self._task, description=what, completed=done, total=total)
        if self._console is not None and self._progress.disable and what != self._what:
            self._console.print(f"{what} …", highlight=False)
        self._what = what
