"""A plan for the eye: a table of policies and what the budget buys, in the terminal, in a notebook, and as bars."""

import html
import io
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cramjax.training import plots
from cramjax.training.display import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from cramjax.planning.plan import Plan

_WIDTH = 110


def rendered(plan: "Plan") -> Group:
    """A plan as a rich renderable."""
    table = Table(
        title=f"{plan.name} on {plan.device}: {format_count(plan.parameters)} parameters",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("policy", "micro", "device", "host", "tok/s", "peak", "fits"):
        table.add_column(name, justify="left" if name in ("policy", "fits") else "right", no_wrap=True)
    for option in plan.options:
        chosen, speed = option.policy == plan.chosen.policy, option.tokens_per_second
        peak = None if speed is None or option.speed is None else speed * plan.flops_per_token / option.speed.peak_flops
        remark = "best" if chosen else "yes" if option.fits else "no"
        table.add_row(
            option.policy,
            f"{option.microbatch}",
            format_bytes(option.memory.device_bytes),
            format_bytes(option.memory.host_bytes) if option.memory.host_bytes else "-",
            "-" if speed is None else format_count(speed),
            "-" if peak is None else f"{peak:.0%}",
            remark,
            style="bold" if chosen else None if option.fits else "dim",
        )
    return Group(table, *map(Text, sentences(plan)))


def sentences(plan: "Plan") -> list[str]:
    """What stands below the table."""
    chosen, device, bought = plan.chosen, plan.device, plan.purchase
    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in chosen.memory.by_kind.items())
    usable = f"{format_bytes(device.usable)} of {format_bytes(device.memory)} are for the step"
    if device.gpu is not None:
        usable += " (the rest is the driver's, and what XLA leaves)"
    lines = [f"Memory: {kinds}. {usable}."]
    if lacking := [f"{option.policy} ({option.lacks})" for option in plan.options if not option.fits]:
        lines.append(f"Does not fit: {'; '.join(lacking)}.")
    if plan.changes:
        options = " ".join(f"--{name}={str(value).lower()}" for name, value in plan.changes.items())
        lines.append(f"The plan chooses microbatch and recomputation, whatever the recipe says. To train so: {options}")
    if plan.exact_device_bytes is not None:
        estimate = chosen.memory.device_bytes / plan.exact_device_bytes - 1
        fits = "" if plan.exact_device_bytes <= device.usable else ", which does not fit"
        lines.append(
            f"Compiler: {format_bytes(plan.exact_device_bytes)}{fits}; the estimate is {estimate:+.1%} from it."
        )
    epochs = "" if bought.epochs is None else f", {bought.epochs:.2g} epochs"
    cost = "" if bought.cost is None else f" It costs {bought.cost:,.2f}."
    lines.append(
        f"Budget {plan.budget}: {format_count(bought.tokens)} tokens{epochs} in {format_count(bought.steps)} steps and "
        f"{format_seconds(bought.seconds)}, {bought.flops:.2g} FLOPs: {bought.chinchilla:.2g} times what is "
        f"Chinchilla-optimal for this size (20 tokens a parameter).{cost}"
    )
    if chosen.speed is not None:
        lines.append(f"Speed: {chosen.speed.source}.")
    return lines


def as_text(plan: "Plan") -> str:
    """A plan as plain text."""
    buffer = io.StringIO()
    # Told that this is no notebook: there it would show itself, and leave the buffer empty.
    Console(file=buffer, width=_WIDTH, color_system=None, force_jupyter=False).print(rendered(plan))
    return buffer.getvalue().rstrip()


def as_html(plan: "Plan") -> str:
    """A plan as HTML."""
    return f"<pre>{html.escape(as_text(plan))}</pre>"


def memory_bars(plan: "Plan") -> plots.Plot:
    """Stacked bars of the memory of each policy, and a line at what a step may take."""
    bars = {f"{option.policy} × {option.microbatch}": option.memory.by_kind for option in plan.options}
    title = f"Memory of {plan.name} on {plan.device}: policy × microbatch"
    return plots.Plot(plots.stacked_bars(title, bars, plan.device.usable))
