"""Fits for the eye: tables of estimates and their intervals, then what a reader should know."""

from collections.abc import Iterator

import numpy as np

from cramjax.scaling.fit.envelope import EnvelopeFit
from cramjax.scaling.fit.isoflop import IsoFlopFit
from cramjax.scaling.fit.parametric import ParametricFit
from cramjax.scaling.fit.powerlaw import PowerLaws
from cramjax.scaling.fit.scaling_fit import ScalingFit
from cramjax.show.numbers import number, span
from cramjax.show.tables import Grid, Page, warning

_LABELS = {
    "alpha": "α",
    "beta": "β",
    "a": "a   (N* ∝ C^a)",
    "b": "b   (D* ∝ C^b)",
    "c": "c   (L* ∝ C^c)",
}


def scaling_fit(fit: ScalingFit) -> Page:
    """Each fit's table, which parameters and FLOPs are counted, and warnings."""
    tables = (part for one in fit.fits.values() for part in (_table(one), ""))
    return Page([*tables, fit.convention, *map(warning, fit.warnings)])


def power_laws(fit: PowerLaws) -> Page:
    """A row for each group."""
    rows = [
        [
            ", ".join(map(str, key)) or f"{fit.y} = c·{fit.x}^p",
            f"{law.exponent:.4f}",
            "{:.4f} … {:.4f}".format(*law.intervals["exponent"]),
            f"{law.coefficient:.4g}",
            str(len(law.x)),
        ]
        for key, law in fit.laws.items()
    ]
    weights = f", weights 1/{fit.std}²" if fit.std else ""
    header = [", ".join(fit.by) or "law", "exponent", "95% interval", "coefficient", "points"]
    return Page([Grid(f"{fit.y} = c·{fit.x}^p{weights}", header, rows, plain=True), *map(warning, fit.warnings)])


def _table(fit: ParametricFit | IsoFlopFit | EnvelopeFit) -> Grid:
    names, rest = list("abc"), list[list[str]]()
    match fit:
        case ParametricFit():
            title, names = f"L = E + A/N^α + B/D^β, {len(fit.runs)} rows", list(fit.intervals)
            rest = [["objective", f"{fit.objective:.4g}", f"noise of log L {fit.noise:.2%}"]]
        case IsoFlopFit():
            title, rest = f"IsoFLOP parabolas at {len(fit.budgets)} budgets", list(_minima(fit))
        case EnvelopeFit():
            title = f"envelope of training curves, {len(np.unique(fit.params))} sizes on it"
    estimates = (
        [_LABELS.get(name, name), number(getattr(fit, name), fit.intervals[name]), span(fit.intervals[name])]
        for name in names
    )
    return Grid(title, ["", "estimate", "95% interval"], [*estimates, *rest], plain=True)


def _minima(fit: IsoFlopFit) -> Iterator[list[str]]:
    for budget in fit.budgets:
        note = f"L* {budget.loss:.4f}" + ("" if budget.used else ", not used")
        yield [f"N* at {budget.flops:.3g} FLOPs", f"{budget.params:.3g}", note]
