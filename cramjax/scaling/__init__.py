"""Scaling laws: what small runs say of large ones. Fits of tables of runs, and advice from fits; no jax is needed."""

from cramjax.scaling.advice import Advice, advise
from cramjax.scaling.envelope import EnvelopeFit, fit_envelope
from cramjax.scaling.fit import ScalingFit, Settings, fit_runs, fit_table, read_fit
from cramjax.scaling.isoflop import IsoFlopFit, fit_isoflop
from cramjax.scaling.parametric import ParametricFit, fit_parametric
from cramjax.scaling.powerlaw import PowerLaw, PowerLaws, fit_power_law, fit_power_laws
from cramjax.scaling.table import Columns, Runs, read_runs

__all__ = [
    "Advice",
    "Columns",
    "EnvelopeFit",
    "IsoFlopFit",
    "ParametricFit",
    "PowerLaw",
    "PowerLaws",
    "Runs",
    "ScalingFit",
    "Settings",
    "advise",
    "fit_envelope",
    "fit_isoflop",
    "fit_parametric",
    "fit_power_law",
    "fit_power_laws",
    "fit_runs",
    "fit_table",
    "read_fit",
    "read_runs",
]
