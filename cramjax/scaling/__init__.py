"""Scaling laws: what small runs say of large ones. Fits of tables of runs, and advice from fits; no jax is needed.

What needs jax, the coordinate check and whole recommendations, is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from cramjax.scaling.advice.advice import Advice, advise
from cramjax.scaling.fit.envelope import EnvelopeFit, fit_envelope
from cramjax.scaling.fit.isoflop import IsoFlopFit, fit_isoflop
from cramjax.scaling.fit.parametric import ParametricFit, fit_parametric
from cramjax.scaling.fit.powerlaw import PowerLaw, PowerLaws, fit_power_law, fit_power_laws
from cramjax.scaling.fit.scaling_fit import ScalingFit, Settings, fit_runs, fit_table, read_fit
from cramjax.scaling.fit.table import Columns, Runs, read_runs

if TYPE_CHECKING:
    from cramjax.scaling.advice.recommendation import Recommendation, recommend
    from cramjax.scaling.coordinates import CoordinateCheck, coordinate_check

__all__ = [
    "Advice",
    "Columns",
    "CoordinateCheck",
    "EnvelopeFit",
    "IsoFlopFit",
    "ParametricFit",
    "PowerLaw",
    "PowerLaws",
    "Recommendation",
    "Runs",
    "ScalingFit",
    "Settings",
    "advise",
    "coordinate_check",
    "fit_envelope",
    "fit_isoflop",
    "fit_parametric",
    "fit_power_law",
    "fit_power_laws",
    "fit_runs",
    "fit_table",
    "read_fit",
    "read_runs",
    "recommend",
]


def __getattr__(name: str) -> Any:
    if name in ("CoordinateCheck", "coordinate_check"):
        from cramjax.scaling import coordinates

        return getattr(coordinates, name)
    if name in ("Recommendation", "recommend"):
        from cramjax.scaling.advice import recommendation

        return getattr(recommendation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
