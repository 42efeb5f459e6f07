"""Weighted power laws against numpy, scipy and published exponents."""

import csv

import numpy as np
import pytest
from scipy import stats

from cramjax.errors import ConfigError
from cramjax.scaling import fit_power_law, fit_power_laws
from tests.scaling.fit.tables import OPTIMA, needs_optima

GROUPS = ["dataset", "hparams", "warmup", "decay", "param_count", "val"]


@needs_optima
def test_published_exponents_are_reproduced():
    fit = fit_power_laws(OPTIMA, x="flops", y="n", std="n_star_std", by=GROUPS)
    with OPTIMA.open(encoding="utf-8") as file:
        published = {tuple(row[name] for name in GROUPS): row for row in csv.DictReader(file)}
    assert len(fit.laws) == 10 and set(fit.laws) == set(published)
    for key, law in fit.laws.items():
        exponent = float(published[key]["published_n_exponent"])
        assert f"{law.exponent:.4f}" == f"{exponent:.4f}"
        assert law.coefficient == pytest.approx(float(published[key]["published_n_coef"]), rel=1e-3)
        low, high = law.intervals["exponent"]
        assert low < exponent < high and high - low < 0.15
        assert fit.json()["groups"][0].keys() >= {*GROUPS, "exponent", "coefficient", "intervals"}
    assert fit.warnings == ("2 of 118 rows have an empty cell and were left out.",)
    assert "0.8353" in str(fit) and "0.8353" in fit._repr_html_()


def test_unweighted_is_linear_regression():
    random = np.random.default_rng(0)
    x = np.geomspace(1e16, 1e20, 9)
    y = 0.3 * x**0.5 * np.exp(0.1 * random.standard_normal(9))
    law, peer = fit_power_law(x, y), stats.linregress(np.log(x), np.log(y))
    assert law.exponent == pytest.approx(peer.slope)
    assert law.coefficient == pytest.approx(np.exp(peer.intercept))
    reach = stats.t.ppf(0.975, 7) * peer.stderr
    assert law.intervals["exponent"] == pytest.approx((peer.slope - reach, peer.slope + reach))
    reach = stats.t.ppf(0.975, 7) * peer.intercept_stderr
    assert np.log(law.intervals["coefficient"]) == pytest.approx((peer.intercept - reach, peer.intercept + reach))


def test_weights_are_those_of_polyfit():
    random = np.random.default_rng(1)
    x, std = np.geomspace(1e16, 1e20, 9), random.uniform(0.05, 0.5, 9)
    y = 0.3 * x**0.5 * np.exp(std * random.standard_normal(9))
    law = fit_power_law(x, y, std)
    slope, level = np.polyfit(np.log(x), np.log(y), 1, w=1 / std)
    assert (law.exponent, law.coefficient) == (pytest.approx(slope), pytest.approx(np.exp(level)))
    (_, _), covariance = np.polyfit(np.log(x), np.log(y), 1, w=1 / std, cov="unscaled")
    scatter = (((np.log(y) - level - slope * np.log(x)) / std) ** 2).sum() / 7
    reach = stats.t.ppf(0.975, 7) * np.sqrt(covariance[0, 0] * max(1, scatter))
    assert np.diff(law.intervals["exponent"])[0] == pytest.approx(2 * reach)


def test_the_interval_of_a_prediction_is_narrowest_in_the_middle():
    x = np.geomspace(1e16, 1e20, 9)
    law = fit_power_law(x, 0.3 * x**0.5 * np.exp(0.1 * np.random.default_rng(0).standard_normal(9)))
    widths = [np.log(high / low) for _, (low, high) in (law.predict(at) for at in (1e16, 1e18, 1e22))]
    assert widths[1] < widths[0] < widths[2]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"flops": [1.0], "params": [2.0]}, {}, "2 coefficients, and there are 1 points"),
        ({"flops": [1.0, 1.0], "params": [2.0, 3.0]}, {}, "all 2 points of a power law are at 1"),
        (
            {"flops": [1.0, 2.0], "params": [2.0, -3.0]},
            {},
            "column params, row 2: -3.0 is not a positive finite number",
        ),
        ({"flops": [1.0, 2.0], "params": [2.0, 3.0]}, {"std": "s"}, "has no column s; it has flops, params"),
        ({"flops": [1.0, 2.0], "params": [2.0, 3.0], "g": ["a", "b"]}, {"by": ["g"]}, "group a: a power law has 2"),
        ({"flops": [None], "params": [2.0]}, {}, "no row with flops, params"),
    ],
)
def test_mistakes(table, options, message):
    with pytest.raises(ConfigError, match=message):
        fit_power_laws(table, **options)
