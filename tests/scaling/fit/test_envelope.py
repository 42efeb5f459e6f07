"""The envelope of training curves follows the law that the curves were drawn from."""

from typing import Any

import numpy as np
import pytest

from cramjax.errors import ConfigError
from cramjax.scaling import Columns, Settings, fit_envelope, fit_runs, read_runs
from tests.scaling.fit.tables import CHINCHILLA, loss_of


def curves(sizes: int = 25, *, name: str = "run") -> dict[str, Any]:
    rows = []
    for number, params in enumerate(np.geomspace(1e6, 1e9, sizes)):
        for tokens in np.geomspace(params * 2, params * 300, 40):
            rows.append((params, tokens, loss_of(CHINCHILLA, params, tokens), f"curve {number}"))
    return dict(zip(("params", "tokens", "loss", name), map(list, zip(*rows, strict=True)), strict=True))


def test_many_curves_give_the_exponents_of_their_law():
    fit = fit_envelope(read_runs(curves()), samples=200)
    exact = 0.28 / 0.62
    assert fit.a == pytest.approx(exact, abs=0.01)  # the envelope is a staircase of 23 sizes
    assert fit.a + fit.b == pytest.approx(1, abs=1e-6)
    assert fit.intervals["a"][0] < exact < fit.intervals["a"][1]
    assert not fit.warnings
    # On the envelope itself:
    middle = len(fit.flops) // 2
    assert fit.loss[middle] == pytest.approx(loss_of(CHINCHILLA, fit.params[middle], fit.tokens[middle]), rel=1e-3)
    assert fit.params.min() > 1.01e6 and fit.params.max() < 0.99e9


def test_it_is_one_of_the_methods():
    fit = fit_runs(curves(name="trial"), Columns(run="trial"), Settings("envelope", samples=100))
    assert list(fit.fits) == ["envelope"] and fit.json()["method"] == "envelope" and 0.4 < fit.json()["a"] < 0.5


def test_few_sizes_are_said():
    assert any("only 3 sizes are on the envelope" in text for text in fit_envelope(read_runs(curves(5))).warnings)


def test_mistakes():
    with pytest.raises(ConfigError, match="at least 3 sizes, and the table has 2"):
        fit_envelope(read_runs(curves(2)))
    with pytest.raises(ConfigError, match="curve a of column run has rows of several sizes"):
        fit_envelope(read_runs(curves(4) | {"run": ["a"] * 160}))
    with pytest.raises(ConfigError, match="fewer than two sizes between"):
        fit_envelope(read_runs(curves(3)))
