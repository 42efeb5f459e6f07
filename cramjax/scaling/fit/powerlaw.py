"""Power laws y = c·x^p by weighted least squares on logarithms: through optima that someone has estimated."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from cramjax.errors import ConfigError
from cramjax.scaling.fit.law import NOISE_FLOOR, Array
from cramjax.scaling.fit.table import Table, complete_rows, positive_column, read_columns
from cramjax.show.numbers import Interval, ends
from cramjax.show.values import Viewed

if TYPE_CHECKING:
    from cramjax.show.figures import Plot
    from cramjax.show.tables import Page

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """y = coefficient · x^exponent, with normal intervals of its logarithms.

    Attributes:
        coefficient: c.
        exponent: p.
        covariance: of (log c, p).
        freedom: points beyond the two coefficients.
        x: of the points.
        y: of the points.
        std: standard deviation of log y of each point; None: all alike, taken from the scatter.
    """

    coefficient: float
    exponent: float
    covariance: Array
    freedom: int
    x: Array
    y: Array
    std: Array | None = None

    @property
    def intervals(self) -> dict[str, Interval]:
        """95% intervals of `exponent` and `coefficient`."""
        reach = self._deviate * np.sqrt(np.diag(self.covariance))
        return {
            "exponent": (self.exponent - reach[1], self.exponent + reach[1]),
            "coefficient": (_exp(math.log(self.coefficient) - reach[0]), _exp(math.log(self.coefficient) + reach[0])),
        }

    def predict(self, x: float) -> tuple[float, Interval]:
        """The law's value at x, and its 95% interval."""
        row = np.array([1.0, math.log(x)])
        log_y = math.log(self.coefficient) + self.exponent * math.log(x)
        reach = self._deviate * math.sqrt(max(float(row @ self.covariance @ row), 0.0))
        return _exp(log_y), (_exp(log_y - reach), _exp(log_y + reach))

    def json(self) -> dict[str, Any]:
        """Everything but the points."""
        intervals = {name: ends(interval) for name, interval in self.intervals.items()}
        return {"coefficient": self.coefficient, "exponent": self.exponent, "intervals": intervals, "rows": len(self.x)}

    @property
    def _deviate(self) -> float:
        return float(stats.t.ppf(0.5 + LEVEL / 2, self.freedom)) if self.freedom else math.inf


def fit_power_law(x: Array, y: Array, std: Array | None = None) -> PowerLaw:
    """Fit y = c·x^p, with weights 1/std² where the points' errors are known.

    With errors given, the intervals use the scatter around the line where it is larger than the errors explain.

    Args:
        x: positive, at least two different values.
        y: positive.
        std: standard deviations of log y.

    Raises:
        ConfigError: fewer points than coefficients, or one x only.
    """
    if len(x) < 2:
        raise ConfigError(f"a power law has 2 coefficients, and there are {len(x)} points: give at least 2, better 5.")
    log_x, log_y = np.log(x), np.log(y)
    if np.ptp(log_x) == 0:
        raise ConfigError(f"all {len(x)} points of a power law are at {x[0]:g}: give points at two values or more.")
    middle = log_x.mean()
    design = np.stack([np.ones_like(log_x), log_x - middle], -1)
    scale = np.ones_like(log_x) if std is None else 1 / std
    (level, exponent), *_ = np.linalg.lstsq(design * scale[:, None], log_y * scale, rcond=None)
    inverse = np.linalg.inv((design * scale[:, None]).T @ (design * scale[:, None]))
    freedom = len(x) - 2
    scatter = float((((log_y - design @ [level, exponent]) * scale) ** 2).sum()) / freedom if freedom else 0.0
    variance = max(scatter, NOISE_FLOOR**2) if std is None else max(scatter, 1.0)
    shift = np.array([[1.0, -middle], [0.0, 1.0]])  # from the level at the middle to that at log x = 0
    covariance = np.asarray(shift @ (inverse * variance) @ shift.T, dtype=np.float64)
    return PowerLaw(_exp(float(level - exponent * middle)), float(exponent), covariance, freedom, x, y, std)


@dataclass(frozen=True, eq=False, repr=False)
class PowerLaws(Viewed):
    """Power laws fitted to the groups of one table.

    Attributes:
        x: the column of x.
        y: the column of y.
        std: the column of standard deviations of log y, if one was used.
        by: the columns that make groups.
        laws: by the values in those columns.
        warnings: what a reader should know.
    """

    x: str
    y: str
    std: str | None
    by: tuple[str, ...]
    laws: dict[tuple[Hashable, ...], PowerLaw]
    warnings: tuple[str, ...] = ()

    @property
    def intervals(self) -> dict[str, Interval]:
        """95% intervals of the exponents, by the groups' values joined with commas."""
        return {",".join(map(str, key)): law.intervals["exponent"] for key, law in self.laws.items()}

    def json(self) -> dict[str, Any]:
        """The laws as a list of groups."""
        groups = [dict(zip(self.by, map(str, key), strict=True)) | law.json() for key, law in self.laws.items()]
        head = {"method": "power-law", "x": self.x, "y": self.y, "std": self.std, "by": list(self.by)}
        return head | {"groups": groups, "warnings": list(self.warnings)}

    def plot(self) -> "Plot":
        """The points and the laws, on logarithmic axes."""
        from cramjax.scaling.fit.plots import power_laws  # here, because matplotlib is slow to import

        return power_laws(self)

    def __rich__(self) -> "Page":
        from cramjax.scaling.fit.show import power_laws

        return power_laws(self)


def fit_power_laws(
    table: Table, *, x: str = "flops", y: str = "params", std: str | None = None, by: Sequence[str] = ()
) -> PowerLaws:
    """Fit y = c·x^p to each group of a table of optima, on logarithms.

    Args:
        table: a CSV or Parquet file, or columns in memory; rows with an empty cell are left out.
        x: the column of x, such as the FLOPs of a budget.
        y: the column of y, such as its best size.
        std: the column of standard deviations of log y; weights are 1/std². Default: all alike.
        by: columns whose values make the groups. Default: one group.

    Raises:
        ConfigError: unreadable file, missing column, bad value, or a group with fewer than two points.
    """
    found = read_columns(table)
    names = [x, y, *([std] if std else []), *by]
    rows = complete_rows(found, names, table)
    if not rows:
        raise ConfigError(f"the table has no row with {', '.join(names)}: give a table with a row for each optimum.")
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    for i in rows:
        groups.setdefault(tuple(found[name][i] for name in by), []).append(i)
    laws: dict[tuple[Hashable, ...], PowerLaw] = {}
    for key, members in groups.items():
        values = [positive_column(found, name, members, table) for name in names[: 3 if std else 2]]
        try:
            laws[key] = fit_power_law(values[0], values[1], values[2] if std else None)
        except ConfigError as error:
            raise ConfigError(f"group {', '.join(map(str, key))}: {error}" if key else str(error)) from None
    lost = len(found[x]) - len(rows)
    warnings = [f"{lost} of {len(found[x])} rows have an empty cell and were left out."] if lost else []
    return PowerLaws(x, y, std, tuple(by), laws, tuple(warnings))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
