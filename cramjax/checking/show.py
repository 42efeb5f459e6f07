"""A check for the eye: the machine, its ceilings, a table of kernels, the small step, and last the verdict."""

import html
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cramjax.training.display import format_bytes, format_count

if TYPE_CHECKING:
    from cramjax.checking.check import Check
    from cramjax.checking.machine import Ceiling

_WIDTH = 120


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

    def __enter__(self) -> "ProgressDisplay":
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


def rendered(check: "Check") -> Group:
    """A check as a rich renderable."""
    return Group(
        *map(Text, _machine(check)),
        _ceilings(check),
        _kernels(check),
        *(Text(line, "dim") for line in (*_limits(check), *_refusals(check))),
        *(Text(line, "red") for line in _failures(check)),
        *map(Text, _step(check)),
        _verdict(check),
    )


def as_text(check: "Check") -> str:
    """A check as plain text."""
    buffer = io.StringIO()
    # Told that this is no notebook: there it would show itself, and leave the buffer empty.
    Console(file=buffer, width=_WIDTH, color_system=None, force_jupyter=False).print(rendered(check))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip()


def as_html(check: "Check") -> str:
    """A check as HTML."""
    return f"<pre>{html.escape(as_text(check))}</pre>"


def _machine(check: "Check") -> Iterator[str]:
    machine = check.machine
    several = f"{machine.count} × " if machine.count > 1 else ""
    capability = f", compute capability {machine.capability}" if machine.capability else ""
    sheet = f" of {format_bytes(machine.sheet_memory)}" if machine.sheet_memory else ""
    yield f"{several}{machine.device}{capability}: {format_bytes(machine.memory)}{sheet} for this process"
    if machine.platform != "cpu":
        yield f"Host: {machine.host_cores} cores, {format_bytes(machine.host_memory)}"
    yield ", ".join(f"{name} {number}" for name, number in machine.versions.items())


def _ceilings(check: "Check") -> Table:
    table = _table("Ceilings", ("", "measured", "data sheet", "share"))
    for ceiling in check.ceilings:
        share = "-" if ceiling.sheet is None else f"{ceiling.measured / ceiling.sheet:.0%}"
        sheet = "-" if ceiling.sheet is None else _speed(ceiling, ceiling.sheet)
        table.add_row(ceiling.name, _speed(ceiling, ceiling.measured), sheet, share)
    return table


def _speed(ceiling: "Ceiling", value: float) -> str:
    return f"{value / 1e12:,.4g} TFLOP/s" if ceiling.unit == "FLOP/s" else f"{value / 1e9:,.4g} GB/s"


def _kernels(check: "Check") -> Table:
    columns = ("kernel", "case", "precision", "by", "error", "ms", "× chosen", "is", "shape")
    table = _table("Kernels, forward and backward, against float32", columns)
    shown, before = [row for row in check.rows if row.refusal is None], ("", "", "")
    for row in shown:
        place, ratio = (row.kernel, row.case, row.dtype), check.ratio(row)
        same = [a == b for a, b in zip(place, before, strict=True)]
        table.add_row(
            "" if same[0] else row.kernel,
            "" if all(same[:2]) else row.case,
            "" if all(same) else row.dtype,
            row.implementation,
            "-" if row.error is None else f"{row.error:.1e}",
            "-" if row.seconds is None else f"{1e3 * row.seconds:.3g}",
            "-" if ratio is None else f"{ratio:.2f}",
            "WRONG" if row.wrong else "chosen" if row.chosen else "right",
            "" if all(same) else "×".join(map(str, row.shape)),
            style="bold red" if row.wrong else None,
        )
        before = place
    return table


def _limits(check: "Check") -> Iterator[str]:
    """Which errors are right, and why."""
    for limit in dict.fromkeys(row.limit for row in check.rows):
        yield f"Errors of up to {limit.error:.1e} are right {limit.reason}."


def _refusals(check: "Check") -> Iterator[str]:
    """Which implementations do not compute what here, and why."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for row in check.rows:
        if row.refusal is not None:
            named = cases.setdefault((row.kernel, row.implementation, row.refusal), [])
            if row.case not in named:
                named.append(row.case)
    of_kernel = {kernel: {row.case for row in check.rows if row.kernel == kernel} for kernel, *_ in cases}
    for (kernel, implementation, reason), named in cases.items():
        what = "" if set(named) == of_kernel[kernel] else f" for {', '.join(named)}"
        yield f"{kernel}: not {implementation}{what}: {reason}"


def _failures(check: "Check") -> Iterator[str]:
    for row in check.rows:
        if row.failure is not None:
            yield f"{row.kernel} {row.case} {row.dtype}: {row.implementation} failed: {row.failure}"


def _step(check: "Check") -> Iterator[str]:
    step = check.step
    share = "" if step.peak_share is None else f", {step.peak_share:.1%} of the peak"
    yield ""
    yield (
        f"Step of {step.recipe} ({format_count(step.parameters)} parameters, {format_count(step.tokens)} tokens, "
        f"{step.dtype}): traced in {step.trace_seconds:.1f} s, compiled in {step.compile_seconds:.1f} s; "
        f"{1e3 * step.seconds:.3g} ms, {format_count(step.tokens / step.seconds)} tokens/s{share}; "
        f"loss {step.losses[0]:.2f} → {step.losses[1]:.2f}"
    )


def _verdict(check: "Check") -> Text:
    if wrong := check.wrong:
        return Text(f"WRONG: {'; '.join(wrong)}. Do not train on this before it is known why.", "bold red")
    checked = sum(row.errors is not None for row in check.rows)
    return Text(f"All {checked} results are right. It took {check.seconds:.0f} s.", "bold green")


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in columns:
        number = name in ("measured", "data sheet", "share", "error", "ms", "× chosen")
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table
