"""Whether 95% intervals hold the truth as often as they say, on tables drawn from known laws."""

import numpy as np
import pytest

from cramjax.scaling import fit_parametric, read_runs
from tests.scaling.fit.tables import CHINCHILLA, REPLICATED, grid_table, isoflop_table

_DRAWS = 200


def _small(truth, **options):
    return isoflop_table(truth, budgets=4, sizes=5, flops=(1e17, 1e19), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "table", "noise"),
    [
        (CHINCHILLA, isoflop_table, 0.01),
        (CHINCHILLA, _small, 0.001),
        (REPLICATED, grid_table, 0.01),
    ],
    ids=["isoflop 1%", "20 runs 0.1%", "grid 1%"],
)
def test_intervals_hold_the_truth(truth, table, noise):
    names = ("E", "alpha", "beta")
    inside = np.empty((_DRAWS, 3), bool)
    for draw in range(_DRAWS):
        fit = fit_parametric(read_runs(table(truth, noise=noise, seed=draw)))
        inside[draw] = [fit.intervals[name][0] <= truth[name] <= fit.intervals[name][1] for name in names]
    share = inside.mean(0)
    assert (share >= 0.93).all(), dict(zip(names, share, strict=True))
    # They are made to hold together in 95% of tables; 200 draws know that to 1.5%.
    assert inside.all(1).mean() >= 0.91
