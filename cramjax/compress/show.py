"""The view of a compression."""

from cramjax.compress.plan import CompressionPlan
from cramjax.compress.report import Compression, MatrixReport
from cramjax.show.numbers import format_bytes, format_count, format_seconds
from cramjax.show.tables import Grid, Page, warning


def page(made: Compression) -> Page:
    """Tables of errors and bytes, and what they come to."""
    total = made.total
    said = [
        f"{made.out}: {total.bits:.3f} bits per parameter with everything counted, {format_bytes(total.after)} in the "
        f"place of {format_bytes(total.before)}, in {format_seconds(made.seconds)}."
    ]
    if made.bits_per_byte is not None:
        before, after = made.bits_per_byte
        said.append(f"Held-out text: {before:.4f} bits per byte before, {after:.4f} after ({after - before:+.4f}).")
    else:
        said.append("Bits per byte were not measured: give held-out text (--text FILE).")
    return Page([_errors(made), _sizes(made), *said, *(warning(note) for note in made.notes)])


def _errors(made: Compression) -> Grid:
    of = "outputs" if made.tokens else "weights"
    rows = []
    for name in dict.fromkeys(matrix.name for matrix in made.matrices):
        own = [matrix for matrix in made.matrices if matrix.name == name]
        worst = max(own, key=lambda matrix: matrix.error)
        rows.append(
            (
                name.removesuffix("/kernel"),
                " × ".join(map(str, worst.shape)),
                f"{_mean(own):.3%}",
                f"{worst.error:.3%}",
                str(worst.block),
                f"{sum(matrix.zeros for matrix in own) / len(own):.1%}",
                format_seconds(sum(matrix.seconds for matrix in own)),
            )
        )
    columns = ("matrix", "shape", "mean error", "worst", "in block", "zeros", "time")
    return Grid(f"Error of {of}, as a share of their energy", columns, rows, left=("shape",))


def _mean(matrices: list[MatrixReport]) -> float:
    return sum(matrix.error for matrix in matrices) / len(matrices)


def _sizes(made: Compression) -> Grid:
    rows = [
        (
            size.part,
            format_count(size.parameters),
            format_bytes(size.before),
            format_bytes(size.after),
            f"{size.bits:.3f}",
        )
        for size in (*made.sizes, made.total)
    ]
    return Grid("Bytes", ("part", "parameters", "before", "after", "bits each"), rows)


def plan_page(plan: CompressionPlan) -> Page:
    """Tables of time and memory, and what they come to."""
    times = [(part, f"{own:.2f} s", format_seconds(plan.blocks * own)) for part, own in plan.seconds.items()]
    times.append(("all", f"{sum(plan.seconds.values()):.2f} s", format_seconds(plan.total_seconds)))
    memory = [(part, format_bytes(own), "") for part, own in plan.device_bytes.items() if own]
    memory += [(part, "", format_bytes(own)) for part, own in plan.host_bytes.items() if own]
    device, host = sum(plan.device_bytes.values()), sum(plan.host_bytes.values())
    memory.append(("all", format_bytes(device), format_bytes(host)))
    config, tokens = plan.config, format_count(plan.tokens)
    how = f"{config.method}" + ("" if config.bits is None else f", {config.bits} bits")
    on = f"{tokens} tokens of calibration" if plan.tokens else "without calibration"
    said = [
        f"{format_bytes(plan.after)} in the place of {format_bytes(plan.before)}: "
        f"{8 * plan.after / plan.parameters:.3f} bits per parameter.",
        f"Memory is at the peak, beside the process itself ({format_bytes(_PROCESS)} or so); on a CPU, the device's is "
        "the host's. Time is work over rates that this machine reached when they were timed, without reading the "
        "model, compiling, rotating, what awq and owl look for, and scoring text, which has the whole "
        "model on the device.",
    ]
    return Page(
        [
            Grid(f"{plan.name}, {how}, {on}, on {plan.device}", ("part", "a block", f"{plan.blocks} blocks"), times),
            Grid("Memory", ("what", "device", "host"), memory),
            *said,
        ],
        width=110,
    )


_PROCESS = 700 << 20
"""Bytes of a process with JAX and its programs, about."""
