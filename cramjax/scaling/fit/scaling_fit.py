"""What a table of runs says of scaling: the chosen fits side by side, as text, JSON and figures."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cramjax.errors import ConfigError, RunError
from cramjax.scaling.fit.envelope import EnvelopeFit, fit_envelope
from cramjax.scaling.fit.isoflop import IsoFlopFit, budgets_of, fit_isoflop
from cramjax.scaling.fit.parametric import LEVEL, IntervalMethod, ParametricFit, Solver, fit_parametric
from cramjax.scaling.fit.powerlaw import PowerLaws, fit_power_laws
from cramjax.scaling.fit.table import SIX_ND, Columns, Runs, Table, read_runs
from cramjax.show.numbers import Interval
from cramjax.show.values import Viewed

if TYPE_CHECKING:
    from cramjax.show.figures import Plot
    from cramjax.show.tables import Page

Method = Literal["auto", "parametric", "isoflop", "envelope"]


@dataclass(frozen=True)
class Settings:
    """How a table is fitted.

    Attributes:
        method: `auto` is the parametric law, and IsoFLOP parabolas if most runs share budgets.
        solver: of the parametric law.
        intervals: of the parametric law: its objective's profile, or a bootstrap of rows.
        delta: of the Huber loss of log L.
        samples: of bootstraps.
        seed: of bootstraps.
    """

    method: Method = "auto"
    solver: Solver = "variable-projection"
    intervals: IntervalMethod = "profile"
    delta: float = 1e-3
    samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("solver", Solver), ("intervals", IntervalMethod)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be {', '.join(get_args(kind))}, got {getattr(self, name)!r}.")
        if not (math.isfinite(self.delta) and self.delta > 0):
            raise ConfigError(f"delta must be a positive number, got {self.delta}: 1e-3 is usual.")
        if self.samples < 100:
            raise ConfigError(f"samples must be 100 or more to have ends of 95% intervals, got {self.samples}.")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}.")


@dataclass(frozen=True, eq=False, repr=False)
class ScalingFit(Viewed):
    """The fits of one table. The first of parametric, isoflop and envelope that there is speaks for all.

    Attributes:
        runs: the table.
        settings: how it was fitted.
        parametric: L = E + A/N^α + B/D^β.
        isoflop: parabolas at each budget and the power laws through their minima.
        envelope: power laws along the lower envelope of training curves.
        notes: what was tried and could not be fitted.
    """

    runs: Runs
    settings: Settings
    parametric: ParametricFit | None = None
    isoflop: IsoFlopFit | None = None
    envelope: EnvelopeFit | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> dict[str, ParametricFit | IsoFlopFit | EnvelopeFit]:
        """The fits there are, by name; the first speaks for all."""
        named = {"parametric": self.parametric, "isoflop": self.isoflop, "envelope": self.envelope}
        return {name: fit for name, fit in named.items() if fit is not None}

    @property
    def a(self) -> float:
        """Exponent of the best size, N* ∝ C^a."""
        return next(iter(self.fits.values())).a

    @property
    def b(self) -> float:
        """Exponent of the best number of tokens, D* ∝ C^b."""
        return next(iter(self.fits.values())).b

    @property
    def intervals(self) -> Mapping[str, Interval]:
        """95% intervals by name."""
        return next(iter(self.fits.values())).intervals

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before trusting the numbers."""
        lost = (
            [f"{self.runs.dropped} rows have an empty cell (runs that failed or are not done) and were left out."]
            if self.runs.dropped
            else []
        )
        return (*lost, *(warning for fit in self.fits.values() for warning in fit.warnings), *self.notes)

    @property
    def convention(self) -> str:
        """Which parameters and FLOPs are counted."""
        columns = self.runs.columns
        flops = f"6·{columns.params}·{columns.tokens}" if columns.flops == SIX_ND else f"column {columns.flops}"
        return f"N is column {columns.params}, D {columns.tokens}, L {columns.loss}; FLOPs are {flops}"

    def json(self) -> dict[str, Any]:
        """Everything, the table included, so that `read_fit` gives it back."""
        first, *others = self.fits
        return {
            "method": first,
            **self.fits[first].json(),
            **{name: self.fits[name].json() for name in others},
            "level": LEVEL,
            "rows": len(self.runs),
            "convention": self.convention,
            "warnings": list(self.warnings),
            "settings": asdict(self.settings) | {"columns": asdict(self.runs.columns)},
            "table": self.runs.json(),
        }

    def plot(self) -> "Plot":
        """IsoFLOP curves, N*(C), D*(C), L*(C), the law's surface and its residuals."""
        from cramjax.scaling.fit.plots import overview  # here, because matplotlib is slow to import

        return overview(self)

    def __rich__(self) -> "Page":
        from cramjax.scaling.fit.show import scaling_fit

        return scaling_fit(self)


def fit_table(table: Table, method: str = "auto", **options: Any) -> ScalingFit | PowerLaws:
    """Fit a table by any method, with options by name: what the command line and notebooks call.

    Args:
        table: a file, or columns in memory.
        method: of `Settings`, or `power-law`.
        options: fields of `Columns` and `Settings`; of `fit_power_laws` for `power-law`.

    Raises:
        ConfigError: as `fit_runs` and `fit_power_laws`, or an option that the method does not have.
    """
    columns, settings = ([field.name for field in fields(kind)] for kind in (Columns, Settings))
    known = ["x", "y", "std", "by"] if method == "power-law" else [*columns, *settings]
    for name in options:
        if name not in known:
            raise ConfigError(f"method {method} has no option {name}. It has: {', '.join(known)}.")
    if method == "power-law":
        return fit_power_laws(table, **options)
    if method not in get_args(Method):
        raise ConfigError(f"method must be {', '.join(get_args(Method))} or power-law, got {method!r}.")
    named = Columns(**{name: value for name, value in options.items() if name in columns})
    chosen = {name: value for name, value in options.items() if name in settings}
    return fit_runs(table, named, Settings(method=method, **chosen))  # pyright: ignore[reportArgumentType]


def fit_runs(table: Table | Runs, columns: Columns | None = None, settings: Settings | None = None) -> ScalingFit:
    """Fit a table of runs.

    Args:
        table: a CSV or Parquet file, columns in memory, or runs that were read before.
        columns: names of the table's columns.
        settings: how to fit.

    Raises:
        ConfigError: the table cannot be read, or is too small for the method.
    """
    settings = settings or Settings()
    runs = table if isinstance(table, Runs) else read_runs(table, columns)
    options = {"samples": settings.samples, "seed": settings.seed}
    if settings.method == "isoflop":
        return ScalingFit(runs, settings, isoflop=fit_isoflop(runs, truth=_truth(runs, settings), **options))
    if settings.method == "envelope":
        return ScalingFit(runs, settings, envelope=fit_envelope(runs, **options))
    law = _parametric(runs, settings)
    isoflop, notes = None, ()
    shared = budgets_of(runs)
    if settings.method == "auto" and len(shared) >= 2 and sum(map(len, shared)) >= len(runs) / 2:
        try:
            isoflop = fit_isoflop(runs, truth=law.loss, **options)
        except ConfigError as error:  # minima beyond the sizes tried
            notes = (f"no IsoFLOP parabolas: {error}",)
    return ScalingFit(runs, settings, parametric=law, isoflop=isoflop, notes=notes)


def read_fit(path: str | Path) -> ScalingFit:
    """A fit from the JSON that `cramjax fit --json` wrote; the table in it is fitted again, in the same way.

    Raises:
        RunError: the file cannot be read, or holds no fit of a table of runs.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        settings = dict(found["settings"])
        columns = Columns(**settings.pop("columns"))
        return fit_runs(found["table"], columns, Settings(**settings))
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror}. Give the file that `cramjax fit --json` wrote."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} holds no fit of a table of runs: give what `cramjax fit TABLE --json` wrote.") from None


def _parametric(runs: Runs, settings: Settings) -> ParametricFit:
    options = {name: getattr(settings, name) for name in ("solver", "intervals", "delta", "samples", "seed")}
    return fit_parametric(runs, **options)


def _truth(runs: Runs, settings: Settings) -> Any:
    try:
        return _parametric(runs, settings).loss
    except ConfigError:
        return None
