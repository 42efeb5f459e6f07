"""What a person sees while a run trains: a live panel in a terminal, an occasional line anywhere else.

The loop hands over the same records that it writes to `metrics.jsonl`; nothing here reads a clock of the run's.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cramjax.show.live import Picture, Sentences, suited
from cramjax.show.numbers import format_bytes, format_count, format_seconds, sparkline

Record = Mapping[str, Any]
"""One line of `metrics.jsonl`: its `kind` is `train`, `evaluate`, `event` or `sample`."""


@runtime_checkable
class Display(Protocol):
    """Shows a run; a context manager that is entered when the run starts and left when it ends."""

    def __enter__(self) -> object: ...

    def __exit__(self, *exc: object) -> None: ...

    def record(self, record: Record) -> None:
        """Show one record of metrics."""
        ...

    def message(self, text: str) -> None:
        """Show a sentence: what is being prepared, what the budget buys, a warning."""
        ...


def make_display(console: Console | None = None, *, quiet: bool = False) -> Display:
    """The display that suits where output goes: live in a terminal, plain lines in a file, a pipe or a notebook.

    Args:
        console: where to write; default: standard error, so that standard output stays for results.
        quiet: show nothing at all.
    """
    return QuietDisplay() if quiet else suited(console, LiveDisplay, PlainDisplay)


class QuietDisplay(Sentences):
    """Shows nothing."""

    def record(self, record: Record) -> None:
        """Drop the record."""


class PlainDisplay(Sentences):
    """Prints evaluations and events as they come, and a line of training metrics every `seconds`."""

    def __init__(self, console: Console, seconds: float = 15.0):
        super().__init__(console)
        self._seconds = seconds
        self._next = 0.0

    def record(self, record: Record) -> None:
        """Print the record if it is an evaluation or an event, or if no training line was printed lately."""
        if record["kind"] == "train":
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + self._seconds
        line = plain_line(record)
        if line:
            self.message(line)


class LiveDisplay(Picture):
    """A panel that is redrawn in place at most `per_second` times a second, from the loop's own thread."""

    def __init__(self, console: Console, per_second: float = 4.0):
        super().__init__(console, 1.0 / per_second)
        self._train: dict[str, Any] = {}
        self._evaluations: list[Record] = []

    def __exit__(self, *exc: object) -> None:
        self._show()
        super().__exit__(*exc)

    def record(self, record: Record) -> None:
        """Take the record into the panel."""
        if record["kind"] == "train":
            self._train.update(record)
        elif record["kind"] == "evaluate":
            self._evaluations.append(record)
        else:
            line = plain_line(record)
            if line:
                self.message(line)
            return
        if self.due():
            self._show()

    def _show(self) -> None:
        if self._train:
            self.draw(render_panel(self._train, self._evaluations))


def render_panel(train: Record, evaluations: list[Record]) -> RenderableType:
    """The live panel: budget bar, the latest training metrics, and held-out scores so far: bits per byte if there are.

    Args:
        train: the newest record of kind `train`.
        evaluations: every record of kind `evaluate`, oldest first.
    """
    fraction = float(train.get("fraction", 0.0))
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    left = eta_seconds(train)
    ends = "" if left is None else f"  {format_seconds(left)} left"
    bar.add_row(ProgressBar(total=1.0, completed=fraction), f"{fraction:6.1%}{ends}")

    figures = Table.grid(padding=(0, 3), expand=True)
    for _ in range(4):
        figures.add_column()
    cells = [_cell(name, value) for name, value in figures_of(train)]
    for start in range(0, len(cells), 4):
        row = cells[start : start + 4]
        figures.add_row(*row, *[Text() for _ in range(4 - len(row))])

    rows: list[RenderableType] = [bar, figures]
    names = ("bits_per_byte", "accuracy", "loss")
    key = next((name for name in names if any(record.get(name) is not None for record in evaluations)), "")
    values = [float(record[key]) for record in evaluations if record.get(key) is not None]
    if values:
        rows.append(
            Text.assemble(
                (f"held-out {key.replace('_', ' ')}  ", "dim"),
                (f"{values[-1]:.3f}  ", "bold green"),
                (sparkline(values), "green"),
            )
        )
    return Panel(Group(*rows), title="CramJAX", title_align="left", border_style="cyan")


def figures_of(record: Record) -> list[tuple[str, str]]:
    """The metrics of a training record that are there, as (name, formatted value), in reading order."""
    formats = {
        "step": ("step", lambda v: f"{int(v):,}"),
        "loss": ("loss", lambda v: f"{v:.3f}"),
        "bits_per_byte": ("bits/byte", lambda v: f"{v:.3f}"),
        "lr": ("lr", lambda v: f"{v:.2e}"),
        "tokens": ("tokens", format_count),
        "tokens_per_second": ("tok/s", format_count),
        "mfu": ("MFU", lambda v: f"{v:.1%}"),
        "memory_bytes": ("memory", format_bytes),
    }
    return _known(record, formats)


def summary_figures(summary: Record) -> list[tuple[str, str]]:
    """What a `summary.json` says of the trained model, as (name, formatted value), in reading order."""
    formats = {
        "bits_per_byte": ("held-out bits per byte", lambda v: f"{v:.3f}"),
        "loss": ("loss, nats per token" if "perplexity" in summary else "held-out loss", lambda v: f"{v:.3f}"),
        "perplexity": ("perplexity per token", lambda v: f"{v:,.1f}"),
        "accuracy": ("accuracy", lambda v: f"{v:.1%}"),
        "params": ("parameters", format_count),
        "tokens": ("training tokens", format_count),
        "steps": ("steps", lambda v: f"{v:,}"),
        "epochs": ("epochs", lambda v: f"{v:.2f}"),
        "flops": ("model FLOPs", lambda v: f"{v:.2e}"),
        "tokens_per_second": ("tokens per second", format_count),
        "mfu": ("model FLOP utilisation", lambda v: f"{v:.1%}"),
        "memory_bytes": ("memory at the peak", format_bytes),
    }
    return _known(summary, formats)


def _known(record: Record, formats: Mapping[str, tuple[str, Callable[[Any], str]]]) -> list[tuple[str, str]]:
    """Names and formatted values of the fields that are there, in the order of `formats`."""
    return [(name, form(record[key])) for key, (name, form) in formats.items() if record.get(key) is not None]


def plain_line(record: Record) -> str:
    """A record as one line of text; empty for kinds that have nothing to say here."""
    kind = record["kind"]
    if kind == "event":
        return str(record.get("message") or record.get("name", ""))
    if kind not in ("train", "evaluate"):
        return ""
    parts = [f"{float(record.get('fraction', 0.0)):6.1%}"]
    if kind == "evaluate":
        names = {"loss": "loss", "bits_per_byte": "bits/byte", "perplexity": "perplexity", "accuracy": "accuracy"}
        values = [f"{name} {float(record[key]):.3f}" for key, name in names.items() if record.get(key) is not None]
        return "  ".join([*parts, "held out:", *values])
    left = eta_seconds(record)
    if left is not None:
        parts.append(f"{format_seconds(left)} left")
    return "  ".join([*parts, *(f"{name} {value}" for name, value in figures_of(record))])


def eta_seconds(record: Record) -> float | None:
    """Seconds until the budget is spent, if it goes on being spent at the average rate so far."""
    fraction, seconds = record.get("fraction"), record.get("seconds")
    if not fraction or seconds is None:
        return None
    return float(seconds) * (1.0 - float(fraction)) / float(fraction)


def _cell(name: str, value: str) -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, "bold"))
