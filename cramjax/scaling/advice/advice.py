"""What to train: a pure function from a fit and a budget to a size, its tokens and the loss to expect."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cramjax.errors import ConfigError
from cramjax.scaling.fit.parametric import ParametricFit
from cramjax.scaling.fit.scaling_fit import ScalingFit
from cramjax.show.numbers import Interval, ends
from cramjax.show.values import Viewed

if TYPE_CHECKING:
    from cramjax.show.tables import Page

_FAR = 10.0
_APART = 2.0


@dataclass(frozen=True, repr=False)
class Advice(Viewed):
    """The best use of a budget, by a fit.

    Attributes:
        flops: the budget, as the fit's table counts FLOPs.
        params: the size to train, as the fit's table counts parameters.
        tokens: what to train it on.
        loss: what it should reach, in the unit of the fit's table.
        intervals: 95%, of `params`, `tokens` and `loss`. By the parametric law the loss is that of a new run, with its
            noise; by power laws it is the law's alone.
        source: the fit it is from: `parametric`, `isoflop` or `envelope`.
        extrapolation: the budget over the largest one in the table.
        warnings: what a reader should know.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    intervals: Mapping[str, Interval]
    source: str
    extrapolation: float
    warnings: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """All fields."""
        values = {
            name: getattr(self, name) for name in ("flops", "params", "tokens", "loss", "source", "extrapolation")
        }
        intervals = {name: ends(interval) for name, interval in self.intervals.items()}
        return values | {"intervals": intervals, "warnings": list(self.warnings)}

    def __rich__(self) -> "Page":
        from cramjax.scaling.advice.show import advice

        return advice(self)


def advise(
    fit: ScalingFit,
    *,
    flops: float | None = None,
    seconds: float | None = None,
    flops_per_second: float | None = None,
) -> Advice:
    """The size and the tokens that a budget buys the lowest loss with.

    Args:
        fit: from `fit_scaling` or `read_fit`.
        flops: the budget; or
        seconds: its time, together with
        flops_per_second: what the machine does of model FLOPs, counted as in the fit's table.

    Raises:
        ConfigError: neither or both kinds of budget, or one that is not positive.
    """
    budget = _budget(flops, seconds, flops_per_second)
    source, law = next(iter(fit.fits.items()))
    if isinstance(law, ParametricFit):
        optimum = law.optimum(budget)
        best = {name: (getattr(optimum, name), interval) for name, interval in optimum.intervals.items()}
    else:
        best = {name: law.predict(name, budget) for name in ("params", "tokens", "loss")}
    largest, smallest = float(fit.runs.flops.max()), float(fit.runs.flops.min())
    warnings = []
    if budget > _FAR * largest:
        warnings.append(
            f"extrapolates far: {budget / largest:.0f} times the table's largest budget ({largest:.3g} FLOPs). The "
            "interval knows the fit's uncertainty, not whether the law goes on. Add runs of larger budgets."
        )
    elif budget < smallest / _FAR:
        warnings.append(
            f"extrapolates far: {smallest / budget:.0f} times below the table's smallest budget ({smallest:.3g} FLOPs)."
        )
    size = best["params"][0]
    if fit.parametric is not None and fit.isoflop is not None:
        other = fit.isoflop.predict("params", budget)[0]
        if not 1 / _APART < other / size < _APART:
            warnings.append(f"the IsoFLOP fit says {other:.3g} parameters, not {size:.3g}: treat both with care.")
    if fit.parametric is None and budget > largest:
        warnings.append(
            f"the {source} fit's power law of the loss has no floor: it is optimistic far beyond the table."
        )
    return Advice(
        flops=budget,
        params=size,
        tokens=best["tokens"][0],
        loss=best["loss"][0],
        intervals={name: interval for name, (_, interval) in best.items()},
        source=source,
        extrapolation=budget / largest,
        warnings=(*warnings, *fit.warnings),
    )


def _budget(flops: float | None, seconds: float | None, flops_per_second: float | None) -> float:
    timed = seconds is not None and flops_per_second is not None
    if (flops is None) != timed or (not timed and (seconds is not None or flops_per_second is not None)):
        raise ConfigError("give the budget as flops, or as seconds together with flops_per_second.")
    budget = flops if flops is not None else (seconds or 0.0) * (flops_per_second or 0.0)
    if not 0 < budget < float("inf"):
        raise ConfigError(f"a budget must be a positive number of FLOPs, got {budget:g}.")
    return budget
