"""IsoFLOP parabolas: exact where the loss is a parabola, biased where it is not, and honest about either."""

import numpy as np
import pytest

from cramjax.errors import ConfigError
from cramjax.scaling import fit_isoflop, fit_parametric, fit_runs, read_runs
from tests.scaling.fit.tables import CHINCHILLA, best_size, isoflop_table


def parabolic_table(noise: float = 0.0, seed: int = 0, budgets: int = 5, sizes: int = 7) -> dict:
    """Losses that are parabolas in log N, with N* = 0.1·C^0.5 and L* = 30·C^−0.05."""
    compute = np.geomspace(1e17, 1e20, budgets)[:, None]
    off = np.linspace(-1.5, 1.5, sizes)
    params = 0.1 * compute**0.5 * np.exp(off)
    loss = 30 * compute**-0.05 * (1 + 0.02 * off**2)
    loss = loss * (1 + noise * np.random.default_rng(seed).standard_normal(loss.shape))
    return {"params": params.ravel(), "tokens": (compute / 6 / params).ravel(), "loss": loss.ravel()}


def test_parabolas_are_recovered():
    fit = fit_isoflop(read_runs(parabolic_table()))
    assert (fit.a, fit.b, fit.c) == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(-0.05))
    assert fit.predict("params", 1e22)[0] == pytest.approx(0.1 * 1e11)
    assert fit.predict("tokens", 1e22)[0] == pytest.approx(1e22 / 6 / 1e10)
    assert fit.predict("loss", 1e22)[0] == pytest.approx(30 * 1e22**-0.05)
    for budget in fit.budgets:
        assert budget.offset == pytest.approx(0, abs=1e-9) and budget.used and not budget.at_edge
    assert fit.warnings == ()


@pytest.mark.slow
def test_bootstrap_intervals_hold_the_exponents():
    inside = np.empty((200, 3), bool)
    for seed in range(200):
        fit = fit_isoflop(read_runs(parabolic_table(0.003, seed)), samples=400)
        truth = {"a": 0.5, "b": 0.5, "c": -0.05}
        inside[seed] = [fit.intervals[name][0] <= truth[name] <= fit.intervals[name][1] for name in truth]
    assert (inside.mean(0) >= 0.92).all(), inside.mean(0)


def test_bootstrap_is_seeded():
    runs = read_runs(parabolic_table(0.003))
    assert fit_isoflop(runs, seed=1).intervals == fit_isoflop(runs, seed=1).intervals
    assert fit_isoflop(runs, seed=1).intervals != fit_isoflop(runs, seed=2).intervals


@pytest.mark.parametrize("truth", [CHINCHILLA, CHINCHILLA | {"A": 3e3, "alpha": 0.45}], ids=["chinchilla", "steep"])
def test_off_centre_sizes_bias_parabolas_and_it_is_said(truth):
    """No noise: centred sizes give the exponent, sizes that drift off centre do not, and the fit knows by how much."""
    exact = truth["beta"] / (truth["alpha"] + truth["beta"])
    centred = fit_runs(isoflop_table(truth, reach=5))
    drifting = fit_runs(isoflop_table(truth, reach=5, shift=(1, 1 / 3)))
    assert centred.isoflop is not None and drifting.isoflop is not None
    assert centred.isoflop.a == pytest.approx(exact, abs=1e-3)
    assert not any("parabolas" in warning for warning in centred.warnings)

    error = drifting.isoflop.a - exact
    assert abs(error) > 0.005 and drifting.isoflop.bias == pytest.approx(error, abs=1e-4)
    for budget in drifting.isoflop.budgets:
        assert budget.bias == pytest.approx(budget.params / best_size(truth, budget.flops), rel=1e-3)
    message = next(warning for warning in drifting.warnings if "off centre" in warning)
    assert "+" in message and "1e+21 FLOPs" in message
    # The parametric law, from the same table, is not biased.
    assert drifting.a == pytest.approx(exact, abs=1e-6)


def test_a_bias_that_matters_is_said_even_near_the_centre():
    fit = fit_runs(isoflop_table(CHINCHILLA | {"alpha": 0.6, "A": 60000.0}, reach=30))
    assert fit.isoflop is not None
    assert any("if the parametric law is true" in warning for warning in fit.warnings)


def test_a_minimum_at_the_edge_is_said_and_left_out():
    table = parabolic_table()
    last = np.arange(len(table["loss"])) >= 28
    size = np.log(table["params"][last])
    table["loss"][last] = table["loss"][last].min() * (1 + 0.02 * (size - size.max() - 0.5) ** 2)
    fit = fit_isoflop(read_runs(table))
    assert [budget.used for budget in fit.budgets] == [True] * 4 + [False]
    assert fit.budgets[-1].at_edge and fit.a == pytest.approx(0.5)
    assert any("at the edge of the sizes tried: add larger sizes. It is left out" in text for text in fit.warnings)


def test_budgets_need_sizes_and_minima():
    table = parabolic_table(budgets=1)
    with pytest.raises(ConfigError, match="at least 2 budgets with 3 sizes or more, and the table has 1"):
        fit_isoflop(read_runs(table))
    away = isoflop_table(CHINCHILLA, reach=1.5, shift=(20, 20))
    with pytest.raises(ConfigError, match="only 0 of 6 budgets have their lowest loss inside"):
        fit_isoflop(read_runs(away))
    assert any("no IsoFLOP parabolas: only 0 of 6" in text for text in fit_runs(away).warnings)


def test_three_sizes_leave_no_intervals():
    fit = fit_isoflop(read_runs(parabolic_table(0.001, sizes=3)))
    assert fit.intervals["a"] == (-np.inf, np.inf) and any("no intervals" in text for text in fit.warnings)
    assert fit.predict("params", 1e21)[1] == (0, np.inf)
    assert fit.json()["intervals"]["a"] == [None, None]


def test_budgets_may_differ_by_a_few_percent():
    table = parabolic_table()
    table["tokens"] = table["tokens"] * np.exp(np.random.default_rng(0).uniform(-0.02, 0.02, len(table["tokens"])))
    fit = fit_runs(table)
    assert fit.isoflop is not None and len(fit.isoflop.budgets) == 5
    assert fit_parametric(fit.runs).a == fit.a
