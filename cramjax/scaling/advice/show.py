"""Advice for the eye: what is best of each quantity, with its interval."""

from cramjax.scaling.advice.advice import Advice
from cramjax.show.numbers import number, span
from cramjax.show.tables import Grid, Page, warning


def advice(found: Advice) -> Page:
    """The best of each with its interval."""
    rows = [[name, *best_of(found, name)] for name in found.intervals]
    title = f"{found.flops:.3g} FLOPs, by the {found.source} fit"
    return Page([Grid(title, ["", "best", "95% interval"], rows, plain=True), *map(warning, found.warnings)])


def best_of(found: Advice, name: str) -> list[str]:
    """What is best of one quantity, and its interval."""
    interval = found.intervals[name]
    return [number(getattr(found, name), interval), span(interval)]
