"""A check for the eye: the machine, its ceilings, a table of kernels, the small step, and last the verdict."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from cramjax.show.numbers import format_bytes, format_count
from cramjax.show.tables import Grid, Page, Row

if TYPE_CHECKING:
    from cramjax.checking.check import Check
    from cramjax.checking.machine import Ceiling


def page(check: "Check") -> Page:
    """A check that ends with its verdict."""
    return Page(
        [
            *_machine(check),
            _ceilings(check),
            _kernels(check),
            *(Text(line, "dim") for line in (*_limits(check), *_refusals(check))),
            *(Text(line, "red") for line in _failures(check)),
            *_step(check),
            _verdict(check),
        ],
        width=120,
    )


def _machine(check: "Check") -> Iterator[str]:
    machine = check.machine
    several = f"{machine.count} × " if machine.count > 1 else ""
    capability = f", compute capability {machine.capability}" if machine.capability else ""
    sheet = f" of {format_bytes(machine.sheet_memory)}" if machine.sheet_memory else ""
    yield f"{several}{machine.device}{capability}: {format_bytes(machine.memory)}{sheet} for this process"
    if machine.platform != "cpu":
        yield f"Host: {machine.host_cores} cores, {format_bytes(machine.host_memory)}"
    yield ", ".join(f"{name} {number}" for name, number in machine.versions.items())


def _ceilings(check: "Check") -> Grid:
    rows = []
    for ceiling in check.ceilings:
        share = "-" if ceiling.sheet is None else f"{ceiling.measured / ceiling.sheet:.0%}"
        sheet = "-" if ceiling.sheet is None else _speed(ceiling, ceiling.sheet)
        rows.append((ceiling.name, _speed(ceiling, ceiling.measured), sheet, share))
    return Grid("Ceilings", ("", "measured", "data sheet", "share"), rows)


def _speed(ceiling: "Ceiling", value: float) -> str:
    return f"{value / 1e12:,.4g} TFLOP/s" if ceiling.unit == "FLOP/s" else f"{value / 1e9:,.4g} GB/s"


def _kernels(check: "Check") -> Grid:
    columns = ("kernel", "case", "precision", "by", "error", "ms", "× chosen", "is", "shape")
    rows: list[Row] = []
    shown, before = [row for row in check.rows if row.refusal is None], ("", "", "")
    for row in shown:
        place, ratio = (row.kernel, row.case, row.dtype), check.ratio(row)
        same = [a == b for a, b in zip(place, before, strict=True)]
        cells = (
            "" if same[0] else row.kernel,
            "" if all(same[:2]) else row.case,
            "" if all(same) else row.dtype,
            row.implementation,
            "-" if row.error is None else f"{row.error:.1e}",
            "-" if row.seconds is None else f"{1e3 * row.seconds:.3g}",
            "-" if ratio is None else f"{ratio:.2f}",
            "WRONG" if row.wrong else "chosen" if row.chosen else "right",
            "" if all(same) else "×".join(map(str, row.shape)),
        )
        rows.append(Row(cells, "bold red" if row.wrong else ""))
        before = place
    words = ("case", "precision", "by", "is", "shape")
    return Grid("Kernels, forward and backward, against float32", columns, rows, left=words, headings=3)


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
