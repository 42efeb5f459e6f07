"""The envelope of training curves (approach 1 of Hoffmann et al. 2022): at each compute, the curve that is lowest.

It takes a table with several rows for each run, of what it had reached on the way. A curve whose learning rate was
still high there stands above what a run of that length would have reached: the envelope is pessimistic of short runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cramjax.errors import ConfigError
from cramjax.scaling.fit.isoflop import ComputeLaws, percentiles
from cramjax.scaling.fit.law import Array
from cramjax.scaling.fit.table import Runs
from cramjax.show.numbers import ends, finite

_POINTS = 400


@dataclass(frozen=True, eq=False, repr=False)
class EnvelopeFit(ComputeLaws):
    """Power laws along the lower envelope of training curves; intervals are of a bootstrap of curves.

    Attributes:
        flops: points of the envelope [point].
        params: the size of the lowest curve there.
        tokens: what it had read there.
        loss: of the lowest curve there.
    """

    flops: Array
    params: Array
    tokens: Array
    loss: Array

    def json(self) -> dict[str, Any]:
        """Exponents and intervals."""
        return {
            **{name: finite(getattr(self, name)) for name in "abc"},
            "coefficients": dict(self.coefficients),
            "intervals": {name: ends(interval) for name, interval in self.intervals.items()},
            "sizes_on_envelope": len(np.unique(self.params)),
        }


def fit_envelope(runs: Runs, *, samples: int = 1000, seed: int = 0) -> EnvelopeFit:
    """Fit power laws along the lower envelope of training curves.

    Stretches where the lowest curve is that of the smallest or the largest size are left out: a size beyond might be
    lower still.

    Args:
        runs: the table, with several rows for each curve.
        samples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ConfigError: fewer than three sizes have a curve, or fewer than two are on the envelope in between.
    """
    curves = _curves(runs)
    sizes = len({float(runs.params[rows[0]]) for rows in curves})
    if sizes < 3:
        raise ConfigError(
            f"the envelope needs training curves (two rows or more) of at least 3 sizes, and the table has {sizes}: "
            f"give rows along each run, told apart by a column `run` (here: {runs.columns.run})."
        )
    grid = np.linspace(float(np.log(runs.flops).min()), float(np.log(runs.flops).max()), _POINTS)
    table = [_interpolate(runs, rows, grid) for rows in curves]
    envelope = _envelope(table)
    if envelope is None:
        raise ConfigError(
            "fewer than two sizes between the smallest and the largest are ever the best ones: add curves of more "
            "sizes, or longer ones."
        )
    laws = _laws(envelope)
    draws = _bootstrap(table, samples, seed)
    exponents = {name: float(laws[law][1]) for name, law in zip("abc", laws, strict=True)}
    intervals = {n: percentiles(draws[law][:, 1], exponents[n]) for n, law in zip("abc", laws, strict=True)}
    warnings: list[str] = []
    on_it = len(np.unique(envelope[1]))
    if on_it < 5:
        warnings.append(
            f"only {on_it} sizes are on the envelope, whose best size is a staircase: add sizes in between."
        )
    return EnvelopeFit(
        *np.exp(envelope),
        **exponents,
        coefficients={name: float(np.exp(law[0])) for name, law in laws.items()},
        intervals=intervals,
        warnings=tuple(warnings),
        draws=draws,
    )


def _curves(runs: Runs) -> list[list[int]]:
    rows: dict[Any, list[int]] = {}
    for i, name in enumerate(runs.curve):
        rows.setdefault(name, []).append(i)
    curves = [sorted(members, key=lambda i: runs.flops[i]) for members in rows.values()]
    for members in curves:
        if np.ptp(np.log(runs.params[members])) > 1e-6:
            raise ConfigError(
                f"curve {runs.curve[members[0]]} of column {runs.columns.run} has rows of several sizes: "
                "name the column that tells runs apart with --run."
            )
    return [members for members in curves if len(members) >= 2]


def _interpolate(runs: Runs, rows: Sequence[int], grid: Array) -> Array:
    """Logs of FLOPs, size, tokens and loss of one curve on a grid of log FLOPs [4, point]; infinite outside."""
    flops = np.log(runs.flops[rows])
    params, tokens, loss = (np.interp(grid, flops, np.log(v[rows])) for v in (runs.params, runs.tokens, runs.loss))
    there = (grid >= flops[0] - 1e-9) & (grid <= flops[-1] + 1e-9)
    return np.stack([grid, params, tokens, np.where(there, loss, np.inf)])


def _envelope(table: Sequence[Array]) -> Array | None:
    """Logs of FLOPs, size, tokens and loss along the envelope, without its ends [4, point]; None: nothing is left."""
    stacked = np.stack(table)
    lowest = np.argmin(stacked[:, 3], 0)
    envelope = np.take_along_axis(stacked, lowest[None, None, :], 0)[0]
    sizes = stacked[:, 1, 0]
    inner = np.isfinite(envelope[3]) & (envelope[1] > sizes.min() + 1e-6) & (envelope[1] < sizes.max() - 1e-6)
    return envelope[:, inner] if len(np.unique(envelope[1, inner])) >= 2 else None


def _laws(envelope: Array) -> dict[str, Array]:
    """(log coefficient, exponent) of each law."""
    names = ("params", "tokens", "loss")
    return {name: np.polyfit(envelope[0], row, 1)[::-1] for name, row in zip(names, envelope[1:], strict=True)}


def _bootstrap(table: Sequence[Array], samples: int, seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    drawn: dict[str, list[Array]] = {"params": [], "tokens": [], "loss": []}
    for _ in range(samples):
        found = _envelope([table[i] for i in random.integers(len(table), size=len(table))])
        if found is not None:
            for name, law in _laws(found).items():
                drawn[name].append(law)
    return {name: np.array(laws).reshape(-1, 2) for name, laws in drawn.items()}
