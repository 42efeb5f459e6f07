"""A plan for the eye: a table of policies and what the budget buys, in the terminal, in a notebook, and as bars."""

from typing import TYPE_CHECKING

from cramjax.show.numbers import format_bytes, format_count, format_seconds
from cramjax.show.tables import Grid, Page, Row

if TYPE_CHECKING:
    from cramjax.planning.plan import Option, Plan
    from cramjax.show.figures import Plot

_COLUMNS = ("policy", "micro", "device", "host", "tok/s", "peak", "fits")


def page(plan: "Plan") -> Page:
    """The table of policies, and sentences."""
    active = plan.active_parameters
    idle = "" if active == plan.parameters else f", {format_count(active)} of them active"
    title = f"{plan.name} on {plan.device}: {format_count(plan.parameters)} parameters{idle}"
    rows = [_row(plan, option) for option in plan.options]
    return Page([Grid(title, _COLUMNS, rows, left=("fits",)), *sentences(plan)], width=110)


def _row(plan: "Plan", option: "Option") -> Row:
    chosen, speed = option.policy == plan.chosen.policy, option.tokens_per_second
    peak = None if speed is None or option.speed is None else speed * plan.flops_per_token / option.speed.peak_flops
    cells = (
        option.policy,
        f"{option.microbatch}",
        format_bytes(option.memory.device_bytes),
        format_bytes(option.memory.host_bytes) if option.memory.host_bytes else "-",
        "-" if speed is None else format_count(speed),
        "-" if peak is None else f"{peak:.0%}",
        "best" if chosen else "yes" if option.fits else "no",
    )
    return Row(cells, "bold" if chosen else "" if option.fits else "dim")


def sentences(plan: "Plan") -> list[str]:
    """What stands below the table."""
    chosen, device, bought = plan.chosen, plan.device, plan.purchase
    idle = plan.parameters - plan.active_parameters
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
        f"Chinchilla-optimal for this size (20 tokens {'an active' if idle else 'a'} parameter).{cost}"
    )
    if chosen.speed is not None:
        lines.append(f"Speed: {chosen.speed.source}.")
    return lines


def memory_of_policies(plan: "Plan") -> "Plot":
    """Stacked bars of the memory of each policy, and a line at what a step may take."""
    from cramjax.show.figures import Plot, memory_bars  # here, because matplotlib is slow to import

    bars = {f"{option.policy} × {option.microbatch}": option.memory.by_kind for option in plan.options}
    return Plot(memory_bars(f"Memory of {plan.name} on {plan.device}: policy × microbatch", bars, plan.device.usable))
